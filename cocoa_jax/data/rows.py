"""Examples -> the arrays of a batch: packed tokens, spans, patches and what is hidden in them.

A batch is a dict of arrays, the rows of this host. Its B rows, T token slots and P patch slots a row are those of one
of the shapes that the settings list, the first into which its examples pack; U = P / 4 visual units a row, C numbers a
patch, E example slots, K bridge tokens, M hidden tokens at most; int32 unless said:

    tokens                      B T    ids as the model sees them, hidden ones replaced; padding 0
    positions                   B T 3  M-RoPE time, height, width, from 0 in every example
    token_start, token_end      B T    the keys that each token sees, visibility of the stage applied
    unit                        B T    the unit of the row that stands in the token's place, -1 for text
    patches                     B P C  float32, normalised pixels, the patches of a unit adjacent
    patch_positions             B P 2  row and column of each patch in its picture
    patch_start, patch_end      B P    the keys that each patch sees in a full vision layer
    window_start, window_end    B P    the same in a windowed layer; family 2.5 only
    predict_at, predict_id      B M    stages 1, 2: the column whose state predicts, and the true id; -1 unused
    hidden_unit, unit_seed      B U    where pictures are rebuilt: bool, which are hidden; uint32, the seed of the
                                       noise of each
    pool                        B E K  columns of each example's bridge tokens, -1 unused
    example                     X      place in the flat [B E] slots of all hosts' rows of each example of the global
                                       batch; in stage 3 queries first, then their targets, then as many places
                                       for negatives of each record as the settings say, -1 where it has fewer
    target_key                  N      stage 3: equal numbers where two targets show the same thing
    image_key                   N      stage 3: equal numbers from 0 where two queries show the same pictures, -1 none
    negative_key                X - 2N stage 3 with hard negatives: numbers that equal the target_key of the same thing,
                                       -1 where there is none
    stats                       8      counts for the log, see ``pipeline.STATS``; not for the device
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from cocoa_jax.attention import spans
from cocoa_jax.attention.spans import Spans
from cocoa_jax.data.checks import check_batch
from cocoa_jax.data.example import BRIDGE, Example
from cocoa_jax.data.packing import Shape
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.vision_plan import plan_image

Arrays = dict[str, np.ndarray]
Row = Sequence[int]
"""Indices of the examples of one row, in the order of their columns."""


@dataclasses.dataclass(frozen=True)
class VisibilityConfig:
    """What a token sees of its own example.

    Args:
        attention: ``bidirectional`` or ``causal``; stage 2 is always truncated at the bridge.
        strict_bridge: stage 2, whether the bridge tokens are kept from block B.
    """

    attention: Literal["bidirectional", "causal"] = "bidirectional"
    strict_bridge: bool = False


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where one example lies in its row of the batch."""

    example: int
    row: int
    slot: int
    column: int
    patch: int


def place(examples: Mapping[int, Example], rows: Sequence[Row]) -> list[Placed]:
    """Lay the examples of each row side by side from slot 0."""
    placed = []
    for row, members in enumerate(rows):
        column = patch = 0
        for slot, index in enumerate(members):
            placed.append(Placed(index, row, slot, column, patch))
            column += len(examples[index].tokens)
            patch += examples[index].patches
    return placed


def write_rows(
    examples: Mapping[int, Example],
    rows: Sequence[Row],
    processor: Processor,
    shape: Shape,
    slots: int,
    visibility: VisibilityConfig,
    truncated: bool,
) -> Arrays:
    """The model's inputs and the pooling columns of ``rows`` (empty rows are padding).

    Args:
        shape: gives T and P.
        slots: E.

    Raises:
        ImageError: a picture cannot be decoded.
        BatchError: the rows are not what the model takes.
    """
    b, t, p, vision = len(rows), shape.tokens, shape.patches, processor.config.vision
    batch: Arrays = {
        "tokens": np.zeros((b, t), np.int32),
        "positions": np.zeros((b, t, 3), np.int32),
        "unit": np.full((b, t), -1, np.int32),
        "patches": np.zeros((b, p, vision.patch_values), np.float32),
        "patch_positions": np.zeros((b, p, 2), np.int32),
        "pool": np.full((b, slots, len(processor.bridge_ids)), -1, np.int32),
    }
    for at in place(examples, rows):
        example, row = examples[at.example], at.row
        columns = slice(at.column, at.column + len(example.tokens))
        patches = slice(at.patch, at.patch + example.patches)
        batch["tokens"][row, columns] = example.tokens
        batch["positions"][row, columns] = example.positions
        shown = example.unit >= 0
        batch["unit"][row, columns][shown] = example.unit[shown] + at.patch // vision.unit_patches
        bridge = np.flatnonzero(example.block == BRIDGE)
        batch["pool"][row, at.slot, : len(bridge)] = bridge + at.column
        if example.images:
            plans = [plan_image(grid, vision).positions for grid in example.grids]
            batch["patch_positions"][row, patches] = np.concatenate(plans)
            processor.fill_patches(example, batch["patches"][row, patches])
    batch |= _token_spans(examples, rows, t, visibility, truncated)
    batch |= _patch_spans(examples, rows, processor, p)
    check_batch(batch, processor.config)
    return batch


def _token_spans(
    examples: Mapping[int, Example], rows: Sequence[Row], total: int, visibility: VisibilityConfig, truncated: bool
) -> Arrays:
    lengths = [[len(examples[i].tokens) for i in row] for row in rows]
    segments = _stack([spans.segments(row, total) for row in lengths])
    if truncated:
        visible = spans.truncated(segments, _bridges(examples, rows, segments), strict=visibility.strict_bridge)
    elif visibility.attention == "causal":
        visible = spans.causal(segments)
    else:
        visible = spans.bidirectional(segments)
    return {"token_start": visible.start.astype(np.int32), "token_end": visible.end.astype(np.int32)}


def _bridges(examples: Mapping[int, Example], rows: Sequence[Row], segments: Spans) -> Spans:
    """The bridge interval of each slot's own document, from the blocks that the rows were built with."""
    start, end = np.zeros_like(segments.start), np.zeros_like(segments.end)
    for at in place(examples, rows):
        block = examples[at.example].block
        bridge = np.flatnonzero(block == BRIDGE)
        columns = slice(at.column, at.column + len(block))
        start[at.row, columns], end[at.row, columns] = at.column + bridge[0], at.column + bridge[-1] + 1
    return Spans(start, end)


def _patch_spans(examples: Mapping[int, Example], rows: Sequence[Row], processor: Processor, total: int) -> Arrays:
    vision = processor.config.vision
    plans = [[plan_image(grid, vision) for i in row for grid in examples[i].grids] for row in rows]
    full = _stack([spans.segments([n for plan in row for n in plan.slices], total) for row in plans])
    arrays = {"patch_start": full.start, "patch_end": full.end}
    if vision.window:
        windows = _stack([spans.segments([n for plan in row for n in plan.windows], total) for row in plans])
        arrays |= {"window_start": windows.start, "window_end": windows.end}
    return arrays


def _stack(rows: Sequence[Spans]) -> Spans:
    return Spans(np.stack([row.start for row in rows]), np.stack([row.end for row in rows]))


def hide_tokens(
    batch: Arrays,
    examples: Mapping[int, Example],
    rows: Sequence[Row],
    choices: Mapping[int, Int32[np.ndarray, " m"]],
    budget: int,
    shift: bool,
    mask_id: int,
) -> None:
    """Replace the chosen tokens of ``batch`` in place and add what is to be predicted where.

    Args:
        choices: ascending positions inside each example; those of a row are at most ``budget`` M.
    """
    predict_at = np.full((len(rows), budget), -1, np.int32)
    predict_id = np.full((len(rows), budget), -1, np.int32)
    for row, members in enumerate(rows):
        starts = np.cumsum([0, *(len(examples[i].tokens) for i in members)])
        chosen = [choices[i] + start for i, start in zip(members, starts[:-1], strict=True)]
        columns = np.concatenate([np.zeros(0, np.int64), *chosen])
        predict_at[row, : len(columns)] = columns - shift
        predict_id[row, : len(columns)] = batch["tokens"][row, columns]
        batch["tokens"][row, columns] = mask_id
    batch["predict_at"], batch["predict_id"] = predict_at, predict_id


def hide_units(
    batch: Arrays,
    examples: Mapping[int, Example],
    rows: Sequence[Row],
    choices: Mapping[int, tuple[np.ndarray, np.ndarray]],
    unit_patches: int,
) -> None:
    """Add which units of ``batch`` are hidden, and the seed of each one's noise."""
    units = batch["patches"].shape[1] // unit_patches
    hidden, seeds = np.zeros((len(rows), units), bool), np.zeros((len(rows), units), np.uint32)
    for at in place(examples, rows):
        chosen, seed = choices[at.example]
        here = slice(at.patch // unit_patches, at.patch // unit_patches + len(chosen))
        hidden[at.row, here], seeds[at.row, here] = chosen, seed
    batch["hidden_unit"], batch["unit_seed"] = hidden, seeds
