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

from cocoa_jax.chips import chip_of_kind
from cocoa_jax.profiling.attention_model import IMPLEMENTATIONS, MODELLED, cell_mask, temporary_bytes
from cocoa_jax.profiling.cells import Cells
from cocoa_jax.profiling.kernels import Problem
from cocoa_jax.profiling.masks import MASKS
from cocoa_jax.profiling.model import LABEL
from cocoa_jax.profiling.topology import parse_topology

MEASURED = "measured"
WARM_UP, REPEATS = 3, 10


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
        bundles: bundles of a kernel's compute regions, one run of each, unmasked first.
    """

    kind: str
    device: str
    implementation: str
    mask: str
    length: int
    backward: bool
    rows: int
    heads: int
    kv_heads: int
    width: int
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
    heads: tuple[int, int] = (12, 2),
    width: int = 128,
    cells: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row for every length, mask and implementation; the forward pass, or forward and backward together.

    Args:
        device: a topology to compile for, or None to measure on the present device.
        rows: of the batch.
        heads: query and key/value heads.
        width: of a head.
        cells: folder that keeps every result of the static model, so that the command can be continued.
        say: takes a line about what comes next.
    Raises:
        ProfileError: an unknown mask or implementation, or one that this device cannot run.
        TopologyError: an unknown topology.
        MeasurementError: a program that does not compile.
    """
    _check(device, lengths, masks, implementations, heads)
    kept = Cells(cells)
    found: list[Row] = []
    for length in lengths:
        for mask in masks:
            group = []
            for name in implementations:
                say(f"{name} {mask} {length}")
                problem = Problem(mask, length, backward, rows, *heads, width)
                values = _modelled(device, name, problem, kept) if device else _measured(name, problem)
                group.append(Row(**values, to_splash=None))
            found += _related(group)
    return found


def _check(
    device: str | None,
    lengths: Sequence[int],
    masks: Sequence[str],
    implementations: Sequence[str],
    heads: tuple[int, int],
) -> None:
    for what, asked, known in (
        ("mask", masks, MASKS),
        ("implementation", implementations, MODELLED if device else tuple(IMPLEMENTATIONS)),
    ):
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ProfileError(f"{what} {unknown[0]!r} is unknown here: choose from {', '.join(known)}")
    if any(length < 1 for length in lengths) or not (lengths and masks and implementations):
        raise ProfileError(f"lengths {list(lengths)}: give positive numbers, and at least one mask and implementation")
    if min(heads) < 1 or heads[0] % heads[1]:
        raise ProfileError(f"heads {heads[0]},{heads[1]}: give query heads, and key heads that divide them")
    if "windowed" in implementations and tuple(masks) != ("windows",):
        raise ProfileError("implementation 'windowed' is for mask 'windows' alone: leave one of them out")
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
    asked = dataclasses.asdict(problem)
    mask = cell_mask(name, problem.mask)
    spec = {"program": "attention", "topology": topology, "implementation": name, **asked, "mask": mask}
    found = cells.get(spec)["masks"]
    best = min(found.get(problem.mask) or found[mask], key=lambda one: one["seconds"])
    return {"kind": LABEL, "device": topology, "implementation": name, **asked, **best}


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
    return {**shown, **dataclasses.asdict(problem), **best}


def median_seconds(call: Callable[[], Any]) -> float:
    """Median wall time of a call on the device, after a warm-up."""
    times = []
    for turn in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        if turn >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)
