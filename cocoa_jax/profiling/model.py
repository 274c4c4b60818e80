"""The static model: the least time that a compiled program can take on a chip, never a measurement.

Of every operation the largest of issue cycles / clock, FLOPs / peak and bytes / bandwidth; of a program their sum, as
if nothing overlapped but the transfers that the compiler runs beside the computation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from cocoa_jax.chips import Chip
from cocoa_jax.profiling.hlo import ENDED, Module, Op
from cocoa_jax.profiling.llo import GridCounts, Parts, dumped, read_program
from cocoa_jax.profiling.twins import Twins

LABEL = "static model"
_PALLAS = 'custom_call_target="tpu_custom_call"'


class ModelError(ValueError):
    """A figure that would need something to be assumed."""


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """What one call of a Pallas kernel does on the given data: runs of its parts, FLOPs, bytes in HBM."""

    counts: GridCounts
    flops: float
    bytes: float


KernelTable = Mapping[str, KernelWork]
"""By a word of the scope that the source made the kernel in and its name, ``vision/span_attention_forward``, or by its
name alone; the beginning of a name will do. The first entry that fits counts."""


@dataclasses.dataclass(frozen=True)
class OpCost:
    """One operation of a program.

    Args:
        name, scope: in the compiled module, and in the source.
        runs: in one call of the program.
        cycles, flops, bytes: of one run; cycles are 0 where the compiler dumped no bundles (a transfer, say).
        parts: of a Pallas kernel.
    """

    name: str
    scope: str
    runs: float
    cycles: float
    flops: float
    bytes: float
    parts: Parts | None

    def issue_seconds(self, chip: Chip) -> float:
        """All runs, at one bundle a cycle."""
        return self.runs * self.cycles / chip.clock

    def seconds(self, chip: Chip) -> float:
        """All runs, by the static model."""
        bounds = (self.cycles / chip.clock, self.flops / chip.peak_flops, self.bytes / chip.hbm_bandwidth)
        return self.runs * max(bounds)


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """A program on a chip.

    Args:
        ops: what runs one after the other.
        transfers: bytes that move beside it.
        unknown: operations with a loop whose length the data decide; it was counted once.
        missing: fusions of which there is no dump, so that their instructions are not counted.
    """

    chip: Chip
    ops: tuple[OpCost, ...]
    transfers: float
    unknown: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def kernels(self) -> tuple[OpCost, ...]:
        """The Pallas kernels among the operations."""
        return tuple(op for op in self.ops if op.parts is not None)

    @property
    def flops(self) -> float:
        """FLOPs of all matrix products."""
        return sum(op.runs * op.flops for op in self.ops)

    @property
    def bytes(self) -> float:
        """Bytes read from and written to HBM."""
        return sum(op.runs * op.bytes for op in self.ops) + self.transfers

    @property
    def issue_seconds(self) -> float:
        """Issue time of all operations."""
        return sum(op.issue_seconds(self.chip) for op in self.ops)

    @property
    def seconds(self) -> float:
        """The whole program by the static model."""
        return max(sum(op.seconds(self.chip) for op in self.ops), self.bytes / self.chip.hbm_bandwidth)


def program_cost(module: Module, dump: Path, chip: Chip, kernels: KernelTable) -> ProgramCost:
    """Put a compiled module, its dumped bundles and what is known of its kernels together.

    Raises:
        ModelError: a Pallas kernel for which ``kernels`` says nothing.
        LloError: counts that do not fit the kernel's loop and regions.
    """
    files = dumped(dump)
    twins = Twins(module, files)
    costs: list[OpCost] = []
    transfers, unknown, missing = 0.0, [], []
    for where, runs in module.runs.items():
        for op in module.computations.get(where, []):
            if _PALLAS in op.rest:
                work = _work_of(op, kernels)
                costs.append(_kernel(op, dump_of(module, where, op, files), runs, work))
                continue
            moved = module.hbm_bytes(where, op)
            if op.starts:
                transfers += runs * moved
                continue
            cycles = 0.0
            if path := twins.dump(where, op):
                program = read_program(path)
                # On a chip of two cores: of one of them, XLA has shared the work already.
                cycles = sum(program.weights())
                if program.dynamic:
                    unknown.append(op.name)
            elif op.kind == "fusion" and not op.name.startswith(ENDED):
                missing.append(op.name)
            flops = module.flops(where, op)
            if cycles or flops or moved:
                costs.append(OpCost(op.name, op.scope, runs, cycles, flops, moved, None))
    return ProgramCost(chip, tuple(costs), transfers, tuple(unknown), tuple(missing))


def _work_of(op: Op, kernels: KernelTable) -> KernelWork:
    work = next((work for name, work in kernels.items() if _named(op, name)), None)
    if work is None:
        raise ModelError(
            f"kernel {op.name}: its time depends on the data; give the number of its grid steps and of its active and "
            "masked tiles (KernelWork)"
        )
    return work


def _kernel(op: Op, dump: Path, runs: float, work: KernelWork) -> OpCost:
    program = read_program(dump)
    cycles = program.kernel_cycles(work.counts)
    return OpCost(op.name, op.scope, runs, cycles, work.flops, work.bytes, program.parts)


def dump_of(module: Module, where: str, op: Op, files: Mapping[str, Path]) -> Path:
    """The dump of a kernel or of its twin: one that occurs twice is built once, under one of the names.

    Raises:
        ModelError: there is neither.
    """
    if op.name in files:
        return files[op.name]
    wanted = _signature(module, where, op)
    for other, ops in module.computations.items():
        for twin in ops:
            if twin.name in files and _PALLAS in twin.rest and _signature(module, other, twin) == wanted:
                return files[twin.name]
    raise ModelError(f"kernel {op.name} has no dump of bundles: was LIBTPU_INIT_ARGS set before JAX started?")


def _signature(module: Module, where: str, op: Op) -> tuple[str, ...]:
    """Name without its number, and the shapes of results and operands without their layouts."""
    shapes = (op.shape, *(module.shapes.get((where, name), "") for name in op.operands))
    return op.name.partition(".")[0], *(re.sub(r"\{[^{}]*\}", "", shape) for shape in shapes)


def _named(op: Op, name: str) -> bool:
    scope, _, kernel = name.rpartition("/")
    return op.name.startswith(kernel) and scope in op.scope
