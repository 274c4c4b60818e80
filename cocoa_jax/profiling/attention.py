"""What attention costs: implementation by mask by length, by the static model or measured on the present device."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoa_jax.profiling.cells import Cells
from cocoa_jax.profiling.chips import Chip, chip_of_kind
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.kernels import (
    Candidate,
    Problem,
    blockwise_candidates,
    flash_candidates,
    reference_candidates,
)
from cocoa_jax.profiling.masks import MASKS
from cocoa_jax.profiling.model import LABEL, ProgramCost, program_cost
from cocoa_jax.profiling.splash import splash_candidates
from cocoa_jax.profiling.topology import parse_topology, tpu_slice

MEASURED = "measured"
WARM_UP, REPEATS = 3, 10

Candidates = Callable[[Problem, Chip | None], list[Candidate]]
IMPLEMENTATIONS: dict[str, Candidates] = {
    "reference": reference_candidates,
    "blockwise": blockwise_candidates,
    "splash": splash_candidates,
    "flash_tpu": flash_candidates,
}
MODELLED = ("reference", "splash", "flash_tpu")  # blockwise loops as often as the data say


class ProfileError(ValueError):
    """A profile that cannot be made as asked."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        kind: ``static model`` or ``measured``.
        device: a topology, or the device that was there.
        blocks: block sizes, of splash the best ones.
        visited, total, masked: tiles of one head.
        flops, bytes: of the kernels, or of the whole program where it has none.
        temporary: bytes of temporary memory of the whole program.
        issue, seconds: issue time and roofline time of the kernels, or of the program where it has none; a measured
            row has the median of the whole program and no issue time.
        around: roofline time of what surrounds the kernels: transposes, sums, the list of tiles.
        to_splash: ``seconds`` over that of splash on the same mask and length.
        bundles: bundles of a kernel's compute regions, per 512 x 512 tile and head, unmasked first.
    """

    kind: str
    device: str
    implementation: str
    mask: str
    length: int
    backward: bool
    blocks: str
    visited: int
    total: int
    masked: int
    flops: float
    bytes: float
    temporary: float
    issue: float
    seconds: float
    around: float
    to_splash: float | None
    bundles: dict[str, list[int]]


def profile_attention(
    device: str | None,
    lengths: Sequence[int],
    masks: Sequence[str],
    implementations: Sequence[str],
    backward: bool,
    rows: int = 1,
    cells: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row for every length, mask and implementation; the forward pass, or forward and backward together.

    Args:
        device: a topology to compile for, or None to measure on the present device.
        rows: of the batch.
        cells: folder that keeps every result of the static model, so that the command can be continued.
        say: takes a line about what comes next.
    Raises:
        ProfileError: an unknown mask or implementation, or one that this device cannot run.
        TopologyError: an unknown topology.
        MeasurementError: a program that does not compile.
    """
    _check(device, lengths, masks, implementations)
    kept = Cells(cells)
    found: list[Row] = []
    for length in lengths:
        for mask in masks:
            group = []
            for name in implementations:
                say(f"{name} {mask} {length}")
                problem = Problem(mask, length, backward, rows)
                values = _modelled(device, name, problem, kept) if device else _measured(name, problem)
                group.append(Row(**values, to_splash=None))
            found += _related(group)
    return found


def _check(device: str | None, lengths: Sequence[int], masks: Sequence[str], implementations: Sequence[str]) -> None:
    for what, asked, known in (
        ("mask", masks, MASKS),
        ("implementation", implementations, MODELLED if device else tuple(IMPLEMENTATIONS)),
    ):
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ProfileError(f"{what} {unknown[0]!r} is unknown here: choose from {', '.join(known)}")
    if any(length < 1 for length in lengths) or not (lengths and masks and implementations):
        raise ProfileError(f"lengths {list(lengths)}: give positive numbers, and at least one mask and implementation")
    if "flash_tpu" in implementations and importlib.util.find_spec("cocoa_jax.attention.flash_tpu") is None:
        raise ProfileError("implementation 'flash_tpu' is not part of this installation: leave it out")
    if device:
        parse_topology(device)
        return
    platform = jax.default_backend()
    for name in ("splash", "flash_tpu"):
        if name in implementations and platform != "tpu":
            raise ProfileError(
                f"implementation {name!r} runs on TPUs, this is a {platform}: leave it out, or --topology"
            )


def _related(group: list[Row]) -> list[Row]:
    yardstick = next((row.seconds for row in group if row.implementation == "splash"), None)
    return [dataclasses.replace(row, to_splash=row.seconds / yardstick) if yardstick else row for row in group]


def _modelled(topology: str, name: str, problem: Problem, cells: Cells) -> dict[str, Any]:
    # Splash computes the same whatever the mask, but for the causal one: it is compiled once.
    mask = "full" if name == "splash" and problem.mask != "causal" else problem.mask
    asked = {**dataclasses.asdict(problem), "mask": mask}
    spec = {"program": "attention", "topology": topology, "implementation": name, **asked}
    result = cells.get(spec)
    best = min(result["candidates"], key=lambda one: one["seconds"])
    shown = {"kind": LABEL, "device": topology, "implementation": name, "mask": problem.mask}
    return {**shown, "length": problem.length, "backward": problem.backward, **best}


def model_cell(spec: dict[str, Any], dump: Path) -> dict[str, Any]:
    """Every candidate of an implementation under the static model; run by ``worker`` with libtpu dumping there."""
    target = tpu_slice(spec["topology"])
    fields = {field.name: spec[field.name] for field in dataclasses.fields(Problem)}
    problem = Problem(**fields)
    mesh = Mesh(np.array(target.devices[:1]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in problem.arrays()]
    found: list[dict[str, Any]] = []
    name = spec["implementation"]
    for candidate in IMPLEMENTATIONS[name](problem, target.chip):
        with jax.set_mesh(mesh):  # Pallas asks the current mesh which chip it is lowered for
            try:
                compiled = jax.jit(candidate.function).lower(*arrays).compile()
            except jax.errors.JaxRuntimeError as error:
                if "vmem" in str(error).lower() and name == "splash":
                    continue  # block sizes too large for this chip
                raise
        own = dump / f"{len(found)}"
        own.mkdir()
        for path in dump.glob("*-final_bundles.txt"):
            path.rename(own / path.name)
        cost = program_cost(Module(compiled.as_text() or ""), own, target.chip, candidate.work)
        found.append(_figures(candidate, cost, compiled))
    if not found:
        raise ProfileError(f"{name}: no block size fits {spec['topology']}")
    return {"candidates": found}


def _figures(candidate: Candidate, cost: ProgramCost, compiled: jax.stages.Compiled) -> dict[str, Any]:
    own = cost.kernels or cost.ops
    seconds = sum(op.seconds(cost.chip) for op in own)
    bundles = {op.name: [part.bundles for part in op.parts.compute] for op in cost.kernels if op.parts}
    return {
        "blocks": candidate.blocks,
        "visited": candidate.visited,
        "total": candidate.total,
        "masked": candidate.masked,
        "flops": sum(op.runs * op.flops for op in own),
        "bytes": sum(op.runs * op.bytes for op in own),
        "temporary": temporary_bytes(compiled),
        "issue": sum(op.issue_seconds(cost.chip) for op in own),
        "seconds": seconds if cost.kernels else cost.seconds,
        "around": sum(op.seconds(cost.chip) for op in cost.ops if op.parts is None) if cost.kernels else 0.0,
        "bundles": bundles,
    }


def _measured(name: str, problem: Problem) -> dict[str, Any]:
    """The fastest candidate on the present device: medians after a warm-up."""
    device = jax.devices()[0]
    chip = chip_of_kind(device.device_kind)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = problem.arrays()
    q, k, v, gradient = (
        jax.random.normal(key, shape.shape, jnp.float32).astype(shape.dtype)
        for key, shape in zip(keys, (*shapes[:3], shapes[5]), strict=True)
    )
    arrays = (q, k, v, *(jnp.asarray(side) for side in (problem.spans.start, problem.spans.end)), gradient)
    best: dict[str, Any] | None = None
    for candidate in IMPLEMENTATIONS[name](problem, chip):
        compiled = jax.jit(candidate.function).lower(*arrays).compile()
        seconds = median_seconds(functools.partial(compiled, *arrays))
        if best is None or seconds < best["seconds"]:
            flops = sum(work.flops for work in candidate.work.values())
            best = {"blocks": candidate.blocks, "visited": candidate.visited, "total": candidate.total}
            best |= {"masked": candidate.masked, "flops": flops, "bytes": 0.0, "issue": 0.0, "seconds": seconds}
            best |= {"temporary": temporary_bytes(compiled), "around": 0.0, "bundles": {}}
    assert best is not None
    shown = {"kind": MEASURED, "device": f"{device.platform} {device.device_kind}", "implementation": name}
    return {**shown, "mask": problem.mask, "length": problem.length, "backward": problem.backward, **best}


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Temporary memory of a compiled program."""
    memory: Any = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)


def median_seconds(call: Callable[[], Any]) -> float:
    """Median wall time of a call on the device, after a warm-up."""
    times = []
    for turn in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        if turn >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)
