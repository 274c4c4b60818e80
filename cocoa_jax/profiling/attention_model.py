"""One compilation of an attention implementation under the static model, read for every mask that it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoa_jax.chips import Chip
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.kernels import (
    Candidate,
    Problem,
    blockwise_candidates,
    flash_candidates,
    reference_candidates,
    windowed_candidates,
)
from cocoa_jax.profiling.masks import MASKS
from cocoa_jax.profiling.model import ModelError, ProgramCost, program_cost
from cocoa_jax.profiling.splash import splash_candidates
from cocoa_jax.profiling.topology import tpu_slice

ANY = "any"  # the mask of a cell whose program takes the spans as data: one compilation serves them all

Candidates = Callable[[Problem, Chip | None], list[Candidate]]
IMPLEMENTATIONS: dict[str, Candidates] = {
    "reference": reference_candidates,
    "blockwise": blockwise_candidates,
    "splash": splash_candidates,
    "flash_tpu": flash_candidates,
    "windowed": windowed_candidates,
}
MODELLED = ("reference", "splash", "flash_tpu", "windowed")  # blockwise loops as often as the data say


def cell_mask(implementation: str, mask: str) -> str:
    """The mask of the cell that holds the figures of an implementation under a mask."""
    if implementation == "splash":  # it computes the same whatever the mask, but for the causal one
        return mask if mask == "causal" else "full"
    return mask if implementation == "windowed" else ANY


def model_cell(spec: dict[str, Any], dump: Path) -> dict[str, Any]:
    """Every candidate of an implementation under the static model; run by ``worker`` with libtpu dumping there.

    Returns:
        ``masks``: figures of the candidates by mask.
    """
    target, name = tpu_slice(spec["topology"]), spec["implementation"]
    mesh = Mesh(np.array(target.devices[:1]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    fields = {field.name: spec[field.name] for field in dataclasses.fields(Problem)}
    problems = [Problem(**fields | {"mask": mask}) for mask in (MASKS if spec["mask"] == ANY else [spec["mask"]])]
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in problems[0].arrays()]
    found: dict[str, list[dict[str, Any]]] = {problem.mask: [] for problem in problems}
    alike = zip(*(IMPLEMENTATIONS[name](problem, target.chip) for problem in problems), strict=True)
    for number, candidates in enumerate(alike):
        with jax.set_mesh(mesh):  # Pallas asks the current mesh which chip it is lowered for
            try:
                compiled = jax.jit(candidates[0].function).lower(*arrays).compile()
            except jax.errors.JaxRuntimeError as error:
                if "vmem" in str(error).lower() and name == "splash":
                    continue  # block sizes too large for this chip
                raise
        own = dump / f"{number}"
        own.mkdir()
        for path in dump.glob("*-final_bundles.txt"):
            path.rename(own / path.name)
        module = Module(compiled.as_text() or "")
        for problem, candidate in zip(problems, candidates, strict=True):
            cost = program_cost(module, own, target.chip, candidate.work)
            found[problem.mask].append(_figures(candidate, cost, compiled))
    if not found[problems[0].mask]:
        raise ModelError(f"{name}: no block size fits {spec['topology']}")
    return {"masks": found}


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


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Temporary memory of a compiled program."""
    memory: Any = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)
