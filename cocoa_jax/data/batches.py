"""Draws of records -> the batch of a step, rows of this process; every host reads all records to plan the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int32, Int64

from cocoa_jax.data.example import BLOCK_B, Example
from cocoa_jax.data.intake import Intake, Taken, arranged
from cocoa_jax.data.masking import Purpose, choose_tokens, choose_units, example_rng, within_budget
from cocoa_jax.data.packing import RowShare, plan_batch
from cocoa_jax.data.pixels import ImageError
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.rows import Arrays, hide_tokens, hide_units, write_rows

if TYPE_CHECKING:
    from cocoa_jax.data.batch_config import BatchConfig
    from cocoa_jax.data.sources import Record

STATS = (
    "kind",
    "rows_used",
    "examples_used",
    "tokens_used",
    "patches_used",
    "extra_rows",
    "bad_records",
    "dropped_masks",
)
"""Entries of ``batch["stats"]``, int32: the source's place among the sorted names (stage 3 of one source a batch, else
-1); rows, examples, tokens and patches used in the global batch; rows beyond the widest shape, for a batch that
overflows all of them; records that others stand in for; tokens un-chosen because an example has more of them than a row
may hide; the last two with a window in its first step, for all of its steps."""

Hidden = Mapping[int, Int32[np.ndarray, " m"]]
"""Positions of each example whose tokens are hidden."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # Grain prints its transforms, and sources hold pictures
class BatchBuilder:
    """(step, [N, 2] of source and record) -> batch of this process's share of the rows."""

    config: BatchConfig
    intake: Intake
    processor: Processor
    seed: int
    share: RowShare

    def __call__(self, step: int, draws: np.ndarray) -> Arrays:
        skip, count = self.config.bad.action == "skip", self.share.count
        # A single host decodes all rows anyway, and looks for a bad picture only when it has met one.
        if not skip or count == 1 or self.intake.known is not None:
            try:
                return self._build(step, draws, self.intake)
            except ImageError:
                if not skip or count > 1:
                    raise
        return self._build(step, draws, dataclasses.replace(self.intake, verify=True))

    def records(self, step: int, draws: np.ndarray) -> list[Record]:
        """The records that a batch is built of."""
        verify = self.config.bad.action == "skip"
        return [one.record for one in dataclasses.replace(self.intake, verify=verify).take(draws, step)[0]]

    def _build(self, step: int, draws: np.ndarray, intake: Intake) -> Arrays:
        config = self.config
        taken, bad = intake.take(draws, step)
        examples = arranged(taken)
        bridge = config.stage == "bridge"
        allowed = {
            i: example.ordinary & (example.block == BLOCK_B) if bridge else example.ordinary
            for i, example in examples.items()
        }
        hidden, dropped = choose(config, allowed, self.seed, step)
        lengths = lengths_of(examples, hidden)
        shape, plan = plan_batch(lengths, config.rows)
        rows = plan + [[] for _ in range(shape.rows - len(plan))]
        local = [rows[row] for row in self.share.of(shape.rows)]
        slots = config.rows.examples_per_row
        batch = write_rows(examples, local, self.processor, shape, slots, config.visibility, truncated=bridge)
        hide(batch, config, self.processor, examples, local, hidden, self.seed, step)
        held = held_places([len(one.examples) - 2 for one in taken], config.negatives)
        batch["example"] = in_places(flat_index(rows, len(examples), slots), held)
        if config.stage == "contrastive":
            batch |= _keys(taken, held)
        kind = int(draws[0, 0]) if config.stage == "contrastive" and config.interleave == 1 else -1
        extra = 0 if shape in config.rows.shapes else shape.rows - config.rows.widest.rows
        tokens, patches, _ = lengths.sum(axis=0)
        batch["stats"] = np.array([kind, len(plan), len(examples), tokens, patches, extra, len(bad), dropped], np.int32)
        intake.note(len(draws), bad)  # now that it is built: one that a bad picture ends is built again
        return batch


def choose(
    config: BatchConfig, allowed: Mapping[int, np.ndarray], seed: int, step: int
) -> tuple[dict[int, np.ndarray], int]:
    """Which tokens of each example are hidden, and how many more would have been, were a row to hold them.

    Before the rows are planned, which then make room for them: the choice depends on no other example.
    """
    masking, dropped = config.masking, 0
    hidden: dict[int, np.ndarray] = {}
    if masking is None:
        return hidden, dropped
    ratio = masking.text_ratio_at(step * config.rows.window, config.steps)
    for i, able in allowed.items():
        rng = example_rng(seed, step, i, Purpose.TOKENS)
        choice = choose_tokens(able, rng, ratio, masking.shift, at_least_one=config.stage == "bridge")
        hidden[i] = within_budget(choice, config.rows.masked_per_row)
        dropped += len(choice.index) - len(hidden[i])
    return hidden, dropped


def hide(
    batch: Arrays,
    config: BatchConfig,
    processor: Processor,
    examples: Mapping[int, Example],
    rows: Sequence[Sequence[int]],
    hidden: Hidden,
    seed: int,
    step: int,
) -> None:
    """Hide the chosen tokens of ``rows``, and the units that are chosen here; in stage 2 only block B has any."""
    masking = config.masking
    if masking is None:
        return
    hide_tokens(batch, examples, rows, hidden, config.rows.masked_per_row, masking.shift, processor.mask_id)
    if config.rebuilds_pictures:
        size = processor.config.vision.unit_patches
        ratio = masking.image_ratio_at(step * config.rows.window, config.steps)
        units = {}
        for i in (i for row in rows for i in row):
            rng, count = example_rng(seed, step, i, Purpose.UNITS), examples[i].patches // size
            able = _units_of_b(examples[i], count) if config.stage == "bridge" else None
            units[i] = choose_units(count, rng, ratio, able)
        hide_units(batch, examples, rows, units, size)


def _units_of_b(example: Example, units: int) -> Bool[np.ndarray, " units"]:
    able = np.zeros(units, bool)
    able[example.unit[(example.block == BLOCK_B) & (example.unit >= 0)]] = True
    return able


def lengths_of(examples: Mapping[int, Example], hidden: Hidden) -> Int64[np.ndarray, "n 3"]:
    """What the packer must know of each example."""
    rows = [(len(example.tokens), example.patches, len(hidden.get(i, ()))) for i, example in examples.items()]
    return np.array(rows, np.int64).reshape(-1, 3)


def flat_index(rows: Sequence[Sequence[int]], total: int, per_row: int) -> Int32[np.ndarray, " X"]:
    """The place of each example among the slots of all rows."""
    flat = np.full(total, -1, np.int32)
    for row, members in enumerate(rows):
        flat[list(members)] = row * per_row + np.arange(len(members))
    return flat


def held_places(counts: Sequence[int], negatives: int) -> Bool[np.ndarray, "N K"]:
    """Which of the ``negatives`` K places of each record hold a hard negative, by how many there are of each."""
    return np.arange(negatives) < np.asarray(counts)[:, None]


def in_places(values: Int32[np.ndarray, " x"], held: Bool[np.ndarray, "N K"]) -> Int32[np.ndarray, " X"]:
    """What examples have, those of the hard negatives last, with -1 in the places that hold none.

    So the number of examples of a batch is that of its settings, however many negatives its records have.
    """
    first = len(values) - int(held.sum())
    places = np.full(held.size, -1, np.int32)
    places[held.ravel()] = values[first:]
    return np.concatenate([values[:first], places])


def numbered_keys(targets: np.ndarray, shown: np.ndarray, nothing: object, held: Bool[np.ndarray, "N K"]) -> Arrays:
    """Numbers in place of keys, equal where the keys are, for the loss to know who is no negative of whom.

    Args:
        targets: keys of the targets of all records, then those of wrong targets.
        shown: keys of the queries' pictures, ``nothing`` for none.
        held: see ``held_places``.
    """
    numbers = in_places(np.unique(targets, return_inverse=True)[1].astype(np.int32), held)
    pictures = np.where(shown == nothing, -1, np.unique(shown, return_inverse=True)[1]).astype(np.int32)
    keys = {"target_key": numbers[: len(held)], "image_key": pictures}
    return keys | {"negative_key": numbers[len(held) :]} if held.size else keys


def _keys(taken: Sequence[Taken], held: Bool[np.ndarray, "N K"]) -> Arrays:
    records = [one.record for one in taken]
    wrong = [key for record in records for key in record.wrong_keys()[: held.shape[1]]]
    targets = np.array([*(record.target_key for record in records), *wrong])
    return numbered_keys(targets, np.array([record.image_key for record in records]), "", held)
