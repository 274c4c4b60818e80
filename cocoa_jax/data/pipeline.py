"""Record sources -> batches, one Grain dataset per stage; the batch of step n is a function of (seed, n) alone."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32, Int64

from cocoa_jax.data.bad import BAD, BadConfig, KnownBad, Ledger
from cocoa_jax.data.intake import Intake, Taken, arranged, examples_of
from cocoa_jax.data.masking import MaskingConfig, Purpose, choose_tokens, choose_units, example_rng, within_budget
from cocoa_jax.data.packing import PackingError, RowsConfig, check_fits, plan_batch, plan_rows, share
from cocoa_jax.data.pixels import ImageError
from cocoa_jax.data.processor import BLOCK_B, Example, Processor
from cocoa_jax.data.rows import Arrays, VisibilityConfig, hide_tokens, hide_units, write_rows
from cocoa_jax.data.sources import content_key

if TYPE_CHECKING:
    from cocoa_jax.data.pairs import RecordSource
    from cocoa_jax.data.sources import Content

__all__ = [
    "STATS",
    "BadConfig",
    "BatchConfig",
    "MaskingConfig",
    "RowsConfig",
    "Stage",
    "VisibilityConfig",
    "embedding_rows",
    "rejected",
    "stage_batches",
    "stage_dataset",
]

Stage = Literal["warmup", "bridge", "contrastive"]

STATS = ("kind", "rows_used", "tokens_used", "patches_used", "extra_rows", "bad_records", "dropped_masks")
"""Entries of ``batch["stats"]``, int32: the source's place among the sorted names (stage 3 of one source a batch, else
-1); rows, tokens and patches used in the global batch; rows beyond the widest shape, for a batch that overflows all of
them; records that others stand in for; tokens un-chosen because an example has more of them than a row may hide."""

_WINDOW = 8  # inference plans rows over this many batches at once, so that rows fill up and lengths are alike


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """All that a batch depends on beside its records, its seed and its step.

    Args:
        masking: what to hide; None in stage 3.
        negatives: hard negatives taken from each record of stage 3.
        interleave: stage 3, in how many equal parts a batch is drawn, each from one source.
        bad: what happens to records that cannot be used.
    """

    stage: Stage
    rows: RowsConfig
    visibility: VisibilityConfig = dataclasses.field(default_factory=VisibilityConfig)
    masking: MaskingConfig | None = None
    negatives: int = 0
    interleave: int = 1
    bad: BadConfig = dataclasses.field(default_factory=BadConfig)

    def __post_init__(self) -> None:
        if (self.masking is None) != (self.stage == "contrastive"):
            raise ValueError(f"stage {self.stage!r} with masking={self.masking}: stages 1 and 2 need it, 3 has none")
        if self.stage == "bridge" and self.visibility.attention != "bidirectional":
            raise ValueError("stage 'bridge' is truncated at the bridge, not causal: set attention to 'bidirectional'")
        if self.negatives and self.stage != "contrastive":
            raise ValueError(f"stage {self.stage!r} has no use for {self.negatives} negatives: set negatives to 0")
        if self.interleave < 1 or self.rows.batch_size % self.interleave:
            raise ValueError(
                f"interleave is {self.interleave} for a batch_size of {self.rows.batch_size}: choose a divisor of it"
            )
        if self.interleave > 1 and self.stage != "contrastive":
            raise ValueError(f"stage {self.stage!r} mixes its sources record by record: set interleave to 1")


def stage_dataset(
    config: BatchConfig,
    sources: Mapping[str, RecordSource],
    weights: Mapping[str, float],
    processor: Processor,
    *,
    seed: int,
    steps: int,
    process_index: int = 0,
    process_count: int = 1,
    known: KnownBad | None = None,
    report: Path | None = None,
) -> grain.MapDataset[Arrays]:
    """The batches of a stage as a random-access sequence: element n is the batch of step n.

    Each source is shuffled anew every epoch and used up before it repeats. A batch of stage 3, or each of its
    interleaved parts, comes from one source; those of stages 1 and 2 mix them. Sources follow one another in
    proportion to their weights, those of weight 0 are left out.

    Args:
        known: what a check of all records found.
        report: JSON lines to which every bad record is added.
    Returns:
        Batches of this process's share of the rows, with ``stats`` (see ``STATS``) beside the model's arrays.
    Raises:
        ValueError: weights without a source, or rows that the processes cannot share.
    """
    names = _weighted(sources, weights)
    share(config.rows.step, process_index, process_count)
    orders = [
        grain.MapDataset.range(len(sources[name])).shuffle(seed=_order_seed(seed, name)).repeat().map(_Tag(kind))
        for kind, name in enumerate(names)
    ]
    size, shares = config.rows.batch_size, [weights[name] for name in names]
    if config.stage == "contrastive":
        part = size // config.interleave
        draws = grain.MapDataset.mix([order.batch(part) for order in orders], shares)
        if config.interleave > 1:
            draws = draws.batch(config.interleave).map(_Joined())
    else:
        draws = grain.MapDataset.mix(orders, shares).batch(size)
    used = tuple(sources[name] for name in names)
    intake = Intake(config, used, processor, seed, Ledger(config.bad, report), known)
    builder = _BatchBuilder(config, intake, processor, seed, process_index, process_count)
    return draws[:steps].map_with_index(builder)


def stage_batches(
    config: BatchConfig,
    sources: Mapping[str, RecordSource],
    weights: Mapping[str, float],
    processor: Processor,
    *,
    seed: int,
    steps: int,
    process_index: int = 0,
    process_count: int = 1,
    known: KnownBad | None = None,
    report: Path | None = None,
    threads: int = 1,
    workers: int = 0,
) -> grain.IterDataset[Arrays]:
    """``stage_dataset`` built ahead by ``threads`` threads, in each of ``workers`` processes if there are any.

    The iterator's ``get_state`` and ``set_state`` resume exactly; neither threads nor workers change a batch.
    """
    dataset = stage_dataset(
        config,
        sources,
        weights,
        processor,
        seed=seed,
        steps=steps,
        process_index=process_index,
        process_count=process_count,
        known=known,
        report=report,
    )
    # Grain's default buffer of 500 elements is meant for records, not for batches of pixels.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = dataset.to_iter_dataset(options)
    if not workers:
        return batches
    # Grain's processes read absl flags, which a program that is not an absl app never parses.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1))


def rejected(config: BatchConfig, source: RecordSource, processor: Processor, seed: int) -> dict[int, str]:
    """Records of ``source`` that cannot become examples, with the reason of each; to be run before training.

    Nothing is decoded: lengths come from the sizes of pictures and from the text. `intake.check` decodes as well.
    """
    reasons = {}
    for index in range(len(source)):
        try:
            examples_of(source.record(index, example_rng(seed, 0, index, Purpose.RECORD)), config, processor)
        except BAD as error:
            reasons[index] = str(error)
    return reasons


def _weighted(sources: Mapping[str, RecordSource], weights: Mapping[str, float]) -> list[str]:
    unknown = sorted(set(weights) ^ set(sources))
    if unknown:
        raise ValueError(f"sources {sorted(sources)} and weights differ in {unknown}: give each source a weight")
    if any(not 0 <= weight < math.inf for weight in weights.values()):
        raise ValueError(f"weights are {dict(weights)}: each is a finite number from 0")
    names = sorted(name for name in sources if weights[name] > 0)
    empty = [name for name in names if not len(sources[name])]
    if not names or empty:
        raise ValueError(f"sources {empty or sorted(sources)} hold no records or no weight: leave them out")
    return names


def _order_seed(seed: int, name: str) -> int:
    # Grain adds the epoch to the seed of a shuffle: neighbouring seeds would give sources the same orders.
    return int(np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class _Tag:
    """Which source an index belongs to."""

    kind: int

    def __call__(self, index: int) -> np.ndarray:
        return np.array([self.kind, index], np.int64)


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Parts of a batch, [n, N / n, 2], as one."""

    def __call__(self, parts: np.ndarray) -> np.ndarray:
        return parts.reshape(-1, 2)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # Grain prints its transforms, and sources hold pictures
class _BatchBuilder:
    """(step, [N, 2] of source and record) -> batch."""

    config: BatchConfig
    intake: Intake
    processor: Processor
    seed: int
    process_index: int
    process_count: int

    def __call__(self, step: int, draws: np.ndarray) -> Arrays:
        skip = self.config.bad.action == "skip"
        # A single host decodes all rows anyway, and looks for a bad picture only when it has met one.
        if not skip or self.process_count == 1 or self.intake.known is not None:
            try:
                return self._build(step, draws, self.intake)
            except ImageError:
                if not skip or self.process_count > 1:
                    raise
        return self._build(step, draws, dataclasses.replace(self.intake, verify=True))

    def _build(self, step: int, draws: np.ndarray, intake: Intake) -> Arrays:
        config = self.config
        taken, replaced = intake.take(draws, step)
        examples = arranged(taken)
        hidden, dropped = self._choose(examples, step)
        shape, plan = plan_batch(_lengths(examples, hidden), config.rows)
        rows = plan + [[] for _ in range(shape.rows - len(plan))]
        local = rows[share(shape.rows, self.process_index, self.process_count)]
        slots, truncated = config.rows.examples_per_row, config.stage == "bridge"
        batch = write_rows(examples, local, self.processor, shape, slots, config.visibility, truncated)
        self._hide(batch, examples, local, hidden, step)
        batch["example"] = _flat_index(rows, len(examples), slots)
        if config.stage == "contrastive":
            batch |= _keys(taken, config.negatives)
        tokens = sum(len(example.tokens) for example in examples.values())
        patches = sum(example.patches for example in examples.values())
        kind = int(draws[0, 0]) if config.stage == "contrastive" and config.interleave == 1 else -1
        extra = 0 if shape in config.rows.shapes else shape.rows - config.rows.widest.rows
        batch["stats"] = np.array([kind, len(plan), tokens, patches, extra, replaced, dropped], np.int32)
        return batch

    def _choose(self, examples: Mapping[int, Example], step: int) -> tuple[_Hidden, int]:
        """Which tokens of each example are hidden, and how many more would have been, were a row to hold them.

        Before the rows are planned, which then make room for them: the choice depends on no other example.
        """
        masking, bridge = self.config.masking, self.config.stage == "bridge"
        hidden: _Hidden = {}
        dropped = 0
        if masking is None:
            return hidden, dropped
        for i, example in examples.items():
            choice = choose_tokens(
                example.ordinary & (example.block == BLOCK_B) if bridge else example.ordinary,
                example_rng(self.seed, step, i, Purpose.TOKENS),
                masking.text_ratio,
                masking.shift,
                at_least_one=bridge,
            )
            hidden[i] = within_budget(choice, self.config.rows.masked_per_row)
            dropped += len(choice.index) - len(hidden[i])
        return hidden, dropped

    def _hide(
        self, batch: Arrays, examples: Mapping[int, Example], rows: Sequence[Sequence[int]], hidden: _Hidden, step: int
    ) -> None:
        masking = self.config.masking
        if masking is None:
            return
        budget, mask_id = self.config.rows.masked_per_row, self.processor.mask_id
        hide_tokens(batch, examples, rows, hidden, budget, masking.shift, mask_id)
        if self.config.stage == "warmup":
            size = self.processor.config.vision.unit_patches
            units = {
                i: choose_units(
                    examples[i].patches // size, example_rng(self.seed, step, i, Purpose.UNITS), masking.image_ratio
                )
                for row in rows
                for i in row
            }
            hide_units(batch, examples, rows, units, size)


def _keys(taken: Sequence[Taken], negatives: int) -> Arrays:
    """Numbers in place of keys, equal where the keys are, for the loss to know who is no negative of whom."""
    records = [one.record for one in taken]
    wrong = [content_key(content) for record in records for content in record.negatives[:negatives]]
    targets = np.unique([*(record.target_key for record in records), *wrong], return_inverse=True)[1].astype(np.int32)
    shown = np.array([record.image_key for record in records])
    pictures = np.where(shown == "", -1, np.unique(shown, return_inverse=True)[1]).astype(np.int32)
    keys = {"target_key": targets[: len(records)], "image_key": pictures}
    return keys | {"negative_key": targets[len(records) :]} if negatives else keys


_Hidden = dict[int, Int32[np.ndarray, " m"]]


def _lengths(examples: Mapping[int, Example], hidden: _Hidden) -> Int64[np.ndarray, "n 3"]:
    rows = [(len(example.tokens), example.patches, len(hidden.get(i, ()))) for i, example in examples.items()]
    return np.array(rows, np.int64).reshape(-1, 3)


def _flat_index(rows: Sequence[Sequence[int]], total: int, per_row: int) -> Int32[np.ndarray, " X"]:
    flat = np.full(total, -1, np.int32)
    for row, members in enumerate(rows):
        flat[list(members)] = row * per_row + np.arange(len(members))
    return flat


def embedding_rows(
    contents: Sequence[Content], processor: Processor, rows: RowsConfig, visibility: VisibilityConfig
) -> Iterator[tuple[Arrays, Int32[np.ndarray, "B E"]]]:
    """Pack contents into batches for inference, every content in exactly one.

    Contents are planned over windows of a few batches, the longest first, into rows of the widest shape; each batch
    then gets the first shape that holds its contents. ``batch_size`` contents are about one batch.

    Yields:
        A batch (the model's arrays and ``pool``), and which content each example slot of it holds, -1 for none.
    Raises:
        ExampleError, ImageError, PackingError: naming the content.
    """
    widest, slots = rows.widest, rows.examples_per_row
    if not widest.patches and any(content.images or content.videos for content in contents):
        raise PackingError("rows.shapes has no patches and there are pictures to embed: give it a shape with patches")
    capacity = (widest.tokens, widest.patches, rows.masked_per_row)
    window = _WINDOW * rows.batch_size
    for start in range(0, len(contents), window):
        examples = {}
        for i in range(start, min(start + window, len(contents))):
            examples[i] = processor.embedding(contents[i], widest.tokens)
            check_fits(len(examples[i].tokens), examples[i].patches, rows, f"content {i}")
        lengths = _lengths(examples, {})
        plan = plan_rows(lengths, capacity, slots)
        for first in range(0, len(plan), widest.rows):
            # Some rows of a first-fit plan, planned again alone, need no more rows than they are.
            chosen = np.sort(np.concatenate(plan[first : first + widest.rows]))
            shape, packed = plan_batch(lengths[chosen], rows)
            part = [[start + int(i) for i in chosen[row]] for row in packed]
            part += [[] for _ in range(shape.rows - len(part))]
            held = np.full((len(part), slots), -1, np.int32)
            for row, members in enumerate(part):
                held[row, : len(members)] = members
            yield write_rows(examples, part, processor, shape, slots, visibility, truncated=False), held
