"""Everything about patches that can be known on the host: order, rope positions, spans, and M-RoPE of whole rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from cocoa_jax.models.config import VisionConfig

Grid = tuple[int, int, int]
"""Temporal slices, patch rows and patch columns of one picture or video."""

Positions = Literal["mrope", "text_1d"]

_PLANS_KEPT = 4096  # distinct picture sizes; a plan takes a few kB


class GridError(ValueError):
    """A grid of patches that the vision tower cannot take."""


@dataclasses.dataclass(frozen=True, eq=False)
class VisionPlan:
    """How the n patches of one grid are stored and seen; a unit is ``merge_size**2`` patches, one visual token.

    Args:
        order: int32 [n], stored patch i is patch ``order[i]`` of the image processor's output.
        positions: int32 [n, 2], row and column of each stored patch in its picture.
        slices: lengths of the spans of full attention, one a temporal slice.
        windows: lengths of the spans of windowed layers; empty for a family without windows.
        unit_of_token: int32 [units], the stored unit that each image token shows, in reading order.
    """

    order: Int32[np.ndarray, " n"]
    positions: Int32[np.ndarray, "n 2"]
    slices: tuple[int, ...]
    windows: tuple[int, ...]
    unit_of_token: Int32[np.ndarray, " units"]


@functools.lru_cache(maxsize=_PLANS_KEPT)
def plan_image(grid: Grid, vision: VisionConfig) -> VisionPlan:
    """Plan one picture or video of ``grid`` patches; family 2.5 stores units window by window.

    Raises:
        GridError: a side is no positive multiple of the merge size.
    Source: ``get_vision_position_ids`` and ``get_vision_window_index`` of transformers 5.23.
    """
    times, rows, columns = grid
    merge = vision.merge_size
    if min(grid) < 1 or rows % merge or columns % merge:
        raise GridError(f"grid {grid}: rows and columns must be positive multiples of {merge}; resize the picture")
    slice_positions = _merged_positions(rows, columns, merge)
    positions = np.tile(slice_positions, (times, 1))
    units, windows = _window_order((times, rows // merge, columns // merge), vision)
    order = (units[:, None] * vision.unit_patches + np.arange(vision.unit_patches)).reshape(-1)
    unit_of_token = np.empty_like(units)
    unit_of_token[units] = np.arange(len(units))
    return VisionPlan(
        order=_frozen(order),
        positions=_frozen(positions[order]),
        slices=(rows * columns,) * times,
        windows=windows,
        unit_of_token=_frozen(unit_of_token),
    )


def _merged_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of each patch of one slice, the patches of a unit side by side; [rows * columns, 2]."""
    place = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = place.reshape(rows // merge, merge, columns // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def _window_order(units: Grid, vision: VisionConfig) -> tuple[np.ndarray, tuple[int, ...]]:
    """Stored order of the units and the patches in each window; reading order and no windows for family 2."""
    times, rows, columns = units
    if not vision.window:
        return np.arange(times * rows * columns), ()
    side = vision.window // vision.merge_size // vision.patch_size
    if side < 1:
        raise GridError(
            f"window of {vision.window} pixels is smaller than one unit of {vision.merge_size * vision.patch_size}: "
            "correct vision_config.window_size"
        )
    down, across = -(-rows // side), -(-columns // side)
    time, row, column = np.ogrid[:times, :rows, :columns]
    window = ((time * down + row // side) * across + column // side).reshape(-1)
    # A stable sort keeps reading order inside a window.
    order = np.argsort(window, kind="stable")
    return order, tuple(int(n) * vision.unit_patches for n in np.bincount(window))


@dataclasses.dataclass(frozen=True)
class VisionRun:
    """The image tokens of one picture (``seconds_per_slice`` None) or one video in a row of tokens."""

    grid: Grid
    seconds_per_slice: float | None = None


def token_positions(
    runs: Sequence[int | VisionRun], vision: VisionConfig, mode: Positions = "mrope"
) -> Int32[np.ndarray, "n 3"]:
    """Time, height and width positions of one example made of text runs (token counts) and vision runs.

    ``mrope``: text advances all three axes, a vision run spreads over them, and what follows starts after its
    longer side. ``text_1d``: plain counting, as checkpoints trained without ``<|vision_start|>`` expect.

    Source: ``get_rope_index`` of transformers 5.23 (the text behind a video does not wait for its time axis).
    """
    if mode == "text_1d":
        total = sum(run if isinstance(run, int) else _units(run.grid, vision) for run in runs)
        return np.repeat(np.arange(total, dtype=np.int32)[:, None], 3, axis=1)
    parts, start = [np.zeros((0, 3), np.int32)], 0
    for run in runs:
        if isinstance(run, int):
            parts.append(np.repeat(np.arange(start, start + run, dtype=np.int32)[:, None], 3, axis=1))
            start += run
        else:
            parts.append(_vision_positions(run, vision) + np.int32(start))
            start += max(run.grid[1:]) // vision.merge_size
    return np.concatenate(parts)


def _units(grid: Grid, vision: VisionConfig) -> int:
    return grid[0] * grid[1] * grid[2] // vision.unit_patches


@functools.lru_cache(maxsize=_PLANS_KEPT)
def _vision_positions(run: VisionRun, vision: VisionConfig) -> np.ndarray:
    times, rows, columns = run.grid[0], run.grid[1] // vision.merge_size, run.grid[2] // vision.merge_size
    # Only Qwen2.5-VL counts seconds, and only in videos; transformers multiplies in float32 and truncates.
    scaled = vision.family == "2.5" and run.seconds_per_slice is not None
    step = np.float32(vision.tokens_per_second) * np.float32(run.seconds_per_slice or 0.0) if scaled else np.float32(1)
    time = (np.arange(times, dtype=np.float32) * step).astype(np.int32)
    grid = np.meshgrid(time, np.arange(rows, dtype=np.int32), np.arange(columns, dtype=np.int32), indexing="ij")
    return _frozen(np.stack(grid, axis=-1).reshape(-1, 3))


def _frozen(array: np.ndarray) -> np.ndarray:
    """An int32 copy that a cache may hand out: nobody can write to it."""
    array = np.ascontiguousarray(array, dtype=np.int32)
    array.flags.writeable = False
    return array
