"""An example: the tokens of one document, their blocks and positions, and the pictures that belong to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int8, Int32

from cocoa_jax.data.sources import Image, Video
from cocoa_jax.data.vision_plan import Grid, Positions, VisionPlan, VisionRun, plan_image, token_positions
from cocoa_jax.models.config import Qwen2VLConfig

PADDING, BLOCK_A, BRIDGE, BLOCK_B = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document of a row; n tokens.

    Args:
        tokens: ids, unmasked.
        block: 1 block A, 2 bridge, 3 block B.
        positions: M-RoPE time, height, width, from 0.
        unit: the example's stored visual unit that an image token shows, -1 for text.
        ordinary: text that may be masked; never special, image or bridge tokens.
        images, grids: the pictures and videos in order, not yet patches.
        patches: how many patches they have together.
    """

    tokens: Int32[np.ndarray, " n"]
    block: Int8[np.ndarray, " n"]
    positions: Int32[np.ndarray, "n 3"]
    unit: Int32[np.ndarray, " n"]
    ordinary: Bool[np.ndarray, " n"]
    images: tuple[Image | Video, ...]
    grids: tuple[Grid, ...]
    patches: int


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Pictures and the ids behind them, of block A, the bridge or block B."""

    number: int
    images: tuple[Image | Video, ...]
    grids: tuple[Grid, ...]
    ids: Sequence[int]


def lay_out(blocks: Sequence[Block], config: Qwen2VLConfig, positions: Positions) -> Example:
    """The example of a document's blocks, in their order."""
    vision = config.vision
    tokens: list[int] = []
    runs: list[int | VisionRun] = []
    units: list[tuple[int, VisionPlan]] = []  # the first column of each picture
    texts: list[tuple[int, int]] = []  # first column and number, one of each block
    block: list[int] = []
    for part in blocks:
        for image, grid in zip(part.images, part.grids, strict=True):
            plan = plan_image(grid, vision)
            seconds = vision.temporal_patch_size / image.fps if isinstance(image, Video) else None
            shown = [config.image_token if seconds is None else config.video_token] * len(plan.unit_of_token)
            units.append((len(tokens) + 1, plan))
            tokens += [config.vision_start_token, *shown, config.vision_end_token]
            runs += [1, VisionRun(grid, seconds), 1]
        if part.number != BRIDGE:
            texts.append((len(tokens), len(part.ids)))
        tokens += part.ids
        runs.append(len(part.ids))
        block += [part.number] * (len(tokens) - len(block))
    ordinary = np.zeros(len(tokens), bool)
    for first, count in texts:
        ordinary[first : first + count] = True
    return Example(
        tokens=np.array(tokens, np.int32),
        block=np.array(block, np.int8),
        positions=token_positions(runs, vision, positions),
        unit=_units(units, len(tokens)),
        ordinary=ordinary,
        images=tuple(image for part in blocks for image in part.images),
        grids=tuple(grid for part in blocks for grid in part.grids),
        patches=sum(len(plan.order) for _, plan in units),
    )


def _units(plans: Sequence[tuple[int, VisionPlan]], total: int) -> Int32[np.ndarray, " n"]:
    unit, offset = np.full(total, -1, np.int32), 0
    for column, plan in plans:
        count = len(plan.unit_of_token)
        unit[column : column + count] = plan.unit_of_token + offset
        offset += count
    return unit
