"""What a batch really holds: its rows as documents of tokens, blocks, hidden tokens, pictures and visibility."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from cocoa_jax.attention.spans import Spans
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.vision_plan import plan_image
from cocoa_jax.evaluation.drawings import to_pixels

_HIDDEN = (194, 106, 45)  # what is drawn in place of a hidden part of a picture: the colour of <EOS> in the pages
_SLOTS = 56  # of a drawn matrix; more cannot be told apart


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token as it is shown, or a whole run of image tokens.

    Args:
        kind: ``a``, ``b``, ``eos`` or ``image``.
        hidden: the model sees a mask here and is asked for the text.
    """

    text: str
    kind: str
    hidden: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One example of a row.

    Args:
        role: what it is in the batch.
        units, hidden_units: visual tokens of its pictures, and those of them that are hidden.
    """

    role: str
    pieces: tuple[Piece, ...]
    pictures: tuple[UInt8[np.ndarray, "h w 3"], ...]
    tokens: int
    patches: int
    units: int = 0
    hidden_units: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class DrawnRow:
    """A row; ``mask`` and ``kinds`` are of some of its slots: runs of image tokens keep three."""

    documents: tuple[Document, ...]
    tokens: int
    patches: int
    mask: Bool[np.ndarray, "S S"]
    kinds: tuple[str, ...]


def read_rows(batch: Mapping[str, np.ndarray], processor: Processor, count: int, bridge: bool) -> list[DrawnRow]:
    """Some rows of a batch that hold something, spread evenly: the first are those of the longest examples.

    Args:
        batch: as `pipeline.stage_dataset` gives it.
        bridge: stage 2, where what follows the bridge is block B.
    """
    used = np.flatnonzero((batch["token_end"] > batch["token_start"]).any(axis=1))
    chosen = used[np.linspace(0, len(used) - 1, min(count, len(used)), dtype=int)]
    return [_row(batch, int(row), processor, bridge) for row in chosen]


def _row(batch: Mapping[str, np.ndarray], row: int, processor: Processor, bridge: bool) -> DrawnRow:
    total, slots = batch["tokens"].shape[1], batch["patches"].shape[1]
    length = int((batch["token_end"][row] > batch["token_start"][row]).sum())
    begins = np.flatnonzero((batch["positions"][row, :length] == 0).all(axis=1))
    kinds = _kinds(batch, row, length, begins, bridge)
    roles, unit = _roles(batch), processor.config.vision.unit_patches
    documents, patch = [], 0
    for slot, (start, end) in enumerate(itertools.pairwise([*begins.tolist(), length])):
        grids = _grids(batch, row, patch, int((batch["unit"][row, start:end] >= 0).sum()) * unit)
        pictures = []
        first = patch
        for grid in grids:
            count = grid[0] * grid[1] * grid[2]
            pictures.append(_picture(batch, row, slice(patch, patch + count), grid, processor))
            patch += count
        role = roles.get(row * batch["pool"].shape[1] + slot, "")
        pieces = tuple(_pieces(batch, row, start, end, kinds, processor))
        units = slice(first // unit, patch // unit)
        hidden = int(batch["hidden_unit"][row, units].sum()) if "hidden_unit" in batch else 0
        count = units.stop - units.start
        documents.append(Document(role, pieces, tuple(pictures), end - start, patch - first, count, hidden))
    columns = _columns(kinds, batch["unit"][row, :length] >= 0, total)
    mask = Spans(batch["token_start"][row : row + 1], batch["token_end"][row : row + 1]).as_mask(total)[0]
    shown = tuple(kinds[c] if c < length else "pad" for c in columns)
    return DrawnRow(tuple(documents), total, slots, np.asarray(mask)[np.ix_(columns, columns)], shown)


def _kinds(batch: Mapping[str, np.ndarray], row: int, length: int, begins: np.ndarray, bridge: bool) -> list[str]:
    """a, eos, b of every slot; documents without a bridge or of stage 3 take turns, so that they can be told apart."""
    kinds = ["a"] * length
    columns = sorted(batch["pool"][row][batch["pool"][row] >= 0].tolist())
    for number, (start, end) in enumerate(itertools.pairwise([*begins.tolist(), length])):
        mine = [c for c in columns if start <= c < end]
        for c in range(start, end):
            if c in mine:
                kinds[c] = "eos"
            elif (bridge and mine and c > mine[-1]) or (not bridge and number % 2):
                kinds[c] = "b"
    return kinds


def _roles(batch: Mapping[str, np.ndarray]) -> dict[int, str]:
    """By flat example slot of the global batch: which example it is."""
    if "target_key" not in batch:
        return {int(place): f"example {i}" for i, place in enumerate(batch["example"])}
    count = len(batch["target_key"])
    names = [f"query {i}" for i in range(count)]
    names += [f"target {i}, key {key}" for i, key in enumerate(batch["target_key"])]
    names += [f"negative {i}" for i in range(len(batch["example"]) - 2 * count)]
    return {int(place): name for place, name in zip(batch["example"], names, strict=True)}


def _pieces(
    batch: Mapping[str, np.ndarray], row: int, start: int, end: int, kinds: Sequence[str], processor: Processor
) -> list[Piece]:
    asked = _asked(batch, row, processor)
    pieces: list[Piece] = []
    column = start
    while column < end:
        run = column
        while run < end and batch["unit"][row, run] >= 0:
            run += 1
        if run > column:
            pieces.append(Piece(f"{run - column} image tokens", "image"))
            column = run
            continue
        number = asked.get(column, int(batch["tokens"][row, column]))
        pieces.append(Piece(_spelled(number, processor), kinds[column], column in asked))
        column += 1
    return pieces


def _asked(batch: Mapping[str, np.ndarray], row: int, processor: Processor) -> dict[int, int]:
    """Column and true id of every hidden token."""
    if "predict_at" not in batch:
        return {}
    at, true = batch["predict_at"][row], batch["predict_id"][row]
    hidden = np.flatnonzero(batch["tokens"][row] == processor.mask_id)
    # Predicted one slot earlier or in place: the first hidden column tells which.
    shift = int(hidden[0] - at[0]) if len(hidden) and at[0] >= 0 else 0
    return {int(a) + shift: int(t) for a, t in zip(at, true, strict=True) if a >= 0}


def _spelled(number: int, processor: Processor) -> str:
    config = processor.config
    special = {
        config.vision_start_token: "⟨picture",
        config.vision_end_token: "picture⟩",
        processor.mask_id: "⟨mask⟩",
        **{bridge: "⟨EOS⟩" for bridge in processor.bridge_ids},
    }
    return special[number] if number in special else processor.text.decode([number]).replace("\n", "⏎")


def _grids(batch: Mapping[str, np.ndarray], row: int, first: int, patches: int) -> list[tuple[int, int, int]]:
    """Height and width in patches of each picture, from the spans and positions of its patches."""
    grids = []
    while patches > 0:
        end = int(batch["patch_end"][row, first])
        rows, columns = (batch["patch_positions"][row, first:end].max(axis=0) + 1).tolist()
        grids.append((1, rows, columns))
        patches, first = patches - (end - first), end
    return grids


def _picture(
    batch: Mapping[str, np.ndarray], row: int, where: slice, grid: tuple[int, int, int], processor: Processor
) -> UInt8[np.ndarray, "h w 3"]:
    patches = batch["patches"][row, where].copy()
    unit = processor.config.vision.unit_patches
    if "hidden_unit" in batch:
        hidden = np.repeat(batch["hidden_unit"][row, where.start // unit : where.stop // unit], unit)
        table = processor.pixels.table
        for colour in range(3):
            part = patches.reshape(len(patches), 3, -1)[:, colour]
            part[hidden] = 0.35 * part[hidden] + 0.65 * table[colour, _HIDDEN[colour]]
    assert len(plan_image(grid, processor.config.vision).order) == len(patches)
    return to_pixels(patches, grid, processor)


def _columns(kinds: Sequence[str], image: Bool[np.ndarray, " n"], total: int) -> np.ndarray:
    """Slots that a matrix shows: all texts, three of each run of image tokens, and two of the padding."""
    kept = [
        c for c in range(len(kinds))
        if not image[c] or c % 8 == 0 or not image[c - 1] or c + 1 == len(kinds) or not image[c + 1]
    ]  # fmt: skip
    if len(kept) > _SLOTS:  # the same share of everything, <EOS> always
        wanted = set(np.linspace(0, len(kept) - 1, _SLOTS, dtype=int).tolist())
        kept = [c for i, c in enumerate(kept) if i in wanted or kinds[c] == "eos"]
    return np.array([*kept, *range(len(kinds), min(len(kinds) + 2, total))])
