"""Whether the true train step of a stage fits a TPU slice, what it costs there at least, and what bounds it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from cocoa_jax.chips import Chip
from cocoa_jax.config import TrainConfig, parse, to_dict
from cocoa_jax.profiling.collectives import by_axis, collectives, seconds_sent
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.model import OpCost, ProgramCost, program_cost
from cocoa_jax.profiling.step_cost import check_step, row_kernels
from cocoa_jax.profiling.steps import abstract_step, read_backbone, step_mesh
from cocoa_jax.profiling.topology import Slice, tpu_slice
from cocoa_jax.training.mesh import AXES
from cocoa_jax.training.state import TrainState

NEXT = "next batch"  # is sent to the device while a step runs on the one before
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


class PlanError(ValueError):
    """A step that does not fit; the message names the remedy."""


def plan_spec(config: TrainConfig, topology: str, slices: int) -> dict[str, Any]:
    """What ``cells`` has to measure.

    Raises:
        TopologyError, ConfigError, ValueError: what cannot be compiled at all; see ``check_step``.
    """
    check_step(config, topology, slices)
    values = to_dict(config)
    return {"program": "plan", "stage": config.stage, "topology": topology, "slices": slices, "config": values}


def plan_step(spec: Mapping[str, Any], dump: Path) -> dict[str, Any]:
    """Compile the step of a spec and cost it; run by ``worker`` with libtpu dumping into ``dump``."""
    config = parse(TrainConfig, spec["config"])
    target, backbone = tpu_slice(spec["topology"], spec["slices"]), read_backbone(config.checkpoint)
    mesh = step_mesh(config, target)
    step, state, batch = abstract_step(config, backbone, mesh)
    sizes = dict(zip(AXES, mesh.devices.shape, strict=True))
    result: dict[str, Any] = {
        "stage": config.stage,
        "topology": spec["topology"],
        "slices": spec["slices"],
        "devices": len(target.devices),
        "mesh": sizes,
        "batch": {name: list(batch[name].shape) for name in ("tokens", "patches")},
        "examples": config.data.rows.batch_size,
        "capacity": target.chip.hbm_bytes,
        "held": held_bytes(state, batch),
    }
    ahead = result["held"][NEXT]
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        try:
            compiled = step.lower(state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            return {**result, "fits": False, "needed": needed_bytes(str(error)) + ahead}
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    module = Module(compiled.as_text())
    cost = program_cost(module, dump, target.chip, row_kernels(config, backbone, mesh, target.chip))
    sent = by_axis(collectives(module, sizes))
    return {
        **result,
        "fits": memory.peak_memory_in_bytes + ahead <= target.chip.hbm_bytes,
        "needed": memory.peak_memory_in_bytes + ahead,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
        "sent": [dict(zip(("kind", "axis", "sites", "runs", "bytes"), row, strict=True)) for row in sent],
        "unknown": list(cost.unknown),
        "missing": list(cost.missing),
        **times(cost, sent, target),
    }


def held_bytes(state: TrainState, batch: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that one device holds while a step begins, by kind, before the compiler pads them."""
    params = dict(state.params)
    frozen = {"frozen weights": params.pop("backbone")} if "adapter" in params else {}
    parts = {**frozen, "trained weights": params, "optimizer": state.optimizer, "batch": dict(batch), NEXT: dict(batch)}
    return {name: sum(_share(leaf) for leaf in jax.tree.leaves(tree)) for name, tree in parts.items()}


def _share(leaf: Any) -> int:
    sharding: NamedSharding = leaf.sharding
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def needed_bytes(message: str) -> float:
    """What a program needs that the compiler refused, from its message.

    Raises:
        PlanError: the compiler refused it for another reason.
    """
    found = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])i?B?(?: of|\) exceeds)", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        first = next((line for line in message.splitlines() if line.strip()), "no reason given")
        raise PlanError(f"the step does not compile: {first.strip()}")
    return float(found[1]) * _UNITS[found[2]]


def times(cost: ProgramCost, sent: list[tuple[str, str, int, int, float]], target: Slice) -> dict[str, Any]:
    """Seconds of a step by what they are spent on, the least that the step can take, and what bounds it."""
    chip = target.chip
    spent = {"matrix units": 0.0, "instructions": 0.0, "memory": 0.0}
    for op in cost.ops:
        kind = _bound(op, chip)
        spent[kind] += op.seconds(chip)
    interconnect, network = seconds_sent(sent, target.ici_bandwidth, chip.dcn_bandwidth)
    limits = {
        f"{max(spent, key=lambda name: spent[name])} of the chip": cost.seconds,
        "interconnect": interconnect,
        "data-centre network": network,
    }
    bound = max(limits, key=lambda name: limits[name])
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "mxu_seconds": cost.flops / chip.peak_flops,
        "chip_seconds": cost.seconds,
        "spent": spent,
        "interconnect_seconds": interconnect,
        "network_seconds": network,
        "step_seconds": limits[bound],
        "bound": bound,
    }


def _bound(op: OpCost, chip: Chip) -> str:
    limits = {
        "matrix units": op.flops / chip.peak_flops,
        "instructions": op.cycles / chip.clock,
        "memory": op.bytes / chip.hbm_bandwidth,
    }
    return max(limits, key=lambda name: limits[name])
