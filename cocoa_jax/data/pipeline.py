"""Record sources -> batches, one Grain dataset per stage; the batch of step n is a function of (seed, n) alone."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import grain
import numpy as np
from absl import flags

from cocoa_jax.data.bad import BAD, BadConfig, KnownBad, Ledger
from cocoa_jax.data.batch_config import BatchConfig, Stage
from cocoa_jax.data.batches import STATS, BatchBuilder
from cocoa_jax.data.intake import Intake, examples_of
from cocoa_jax.data.masking import MaskingConfig, Purpose, example_rng
from cocoa_jax.data.mixture import with_negatives
from cocoa_jax.data.packing import ALONE, PackingError, RowsConfig, RowShare, Shape
from cocoa_jax.data.planned import PlannedBuilder, stored_lengths
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.rows import Arrays, VisibilityConfig, write_rows

if TYPE_CHECKING:
    from cocoa_jax.data.pairs import RecordSource

__all__ = [
    "STATS",
    "BadConfig",
    "BatchConfig",
    "MaskingConfig",
    "RowsConfig",
    "Stage",
    "VisibilityConfig",
    "built_ahead",
    "rejected",
    "stage_batches",
    "stage_dataset",
    "step_records",
    "widest_bytes",
]

_AHEAD = 32 * 2**30  # bytes of batches that are built ahead on a host, by all of its workers if there are any


def stage_dataset(
    config: BatchConfig,
    sources: Mapping[str, RecordSource],
    weights: Mapping[str, float],
    processor: Processor,
    *,
    seed: int,
    steps: int,
    share: RowShare = ALONE,
    known: KnownBad | None = None,
    report: Path | None = None,
) -> grain.MapDataset[Arrays]:
    """The batches of a stage as a random-access sequence: element n is the batch of step n.

    Each source is shuffled anew every epoch and used up before it repeats. A batch of stage 3, or each of its
    interleaved parts, comes from one source; those of stages 1 and 2 mix them. Sources follow one another in
    proportion to their weights, those of weight 0 are left out.

    Where every source has stored lengths, rows are planned from them and each process reads only what its own rows
    hold.

    Args:
        known: what a check of all records found.
        report: JSON lines to which every bad record is added.
    Returns:
        Batches of this process's share of the rows, with ``stats`` (see ``STATS``) beside the model's arrays.
    Raises:
        ValueError: weights without a source, or rows that the devices cannot share.
    """
    share.of(config.rows.step)
    draws, used = _draws(config, sources, weights, seed, steps)
    intake = Intake(config, used, processor, seed, Ledger(config.bad, report), known)
    builder = _builder(config, intake, processor, seed, share)
    return draws.map_with_index(builder)


def step_records(
    config: BatchConfig,
    sources: Mapping[str, RecordSource],
    weights: Mapping[str, float],
    processor: Processor,
    *,
    seed: int,
    step: int,
    known: KnownBad | None = None,
) -> list[str]:
    """Data set and id of every record of a step's batch, in the order of its draws; with a window, of all its steps."""
    draws, used = _draws(config, sources, weights, seed, step + 1)
    intake = Intake(config, used, processor, seed, Ledger(BadConfig("skip", 1.0), None), known)
    builder = _builder(config, intake, processor, seed, ALONE)
    return [f"{record.dataset} {record.id}" for record in builder.records(step, np.asarray(draws[step]))]


def _draws(
    config: BatchConfig, sources: Mapping[str, RecordSource], weights: Mapping[str, float], seed: int, steps: int
) -> tuple[grain.MapDataset[np.ndarray], tuple[RecordSource, ...]]:
    """By step, [N, 2] of source and record (with a window, those of all its steps), and the sources in their order."""
    names = _weighted(sources, weights)
    orders = [
        grain.MapDataset.range(len(sources[name])).shuffle(seed=_order_seed(seed, name)).repeat().map(_Tag(kind))
        for kind, name in enumerate(names)
    ]
    size, shares = config.rows.batch_size, [weights[name] for name in names]
    if config.stage == "contrastive":
        part = size // config.interleave
        draws = grain.MapDataset.mix([_batched(order, part) for order in orders], shares)
        if config.interleave > 1:
            draws = draws.batch(config.interleave).map(_Joined())
    else:
        draws = _batched(grain.MapDataset.mix(orders, shares), size * config.rows.window)
    if config.rows.window > 1:
        draws = grain.MapDataset.range(steps).map(_InWindow(draws, config.rows.window))
    return draws[:steps], tuple(with_negatives(sources[name], config.negatives) for name in names)


def _batched(draws: grain.MapDataset[np.ndarray], size: int) -> grain.MapDataset[np.ndarray]:
    # A dataset that repeats for ever is as long as a length can be, and Grain cannot count its batches of one.
    return draws.batch(size) if size > 1 else draws.map(_Alone())


def _builder(
    config: BatchConfig, intake: Intake, processor: Processor, seed: int, share: RowShare
) -> PlannedBuilder | BatchBuilder:
    stored = [stored_lengths(source, config, processor) for source in intake.sources]
    if all(stored):
        return PlannedBuilder(config, intake, tuple(filter(None, stored)), processor, seed, share)
    if config.rows.window > 1:
        missing = [source.name for source, lengths in zip(intake.sources, stored, strict=True) if lengths is None]
        raise PackingError(
            f"rows.window is {config.rows.window}, {missing} have no stored lengths for these settings: build them by "
            "`cocoa data build` with the same processor, or set rows.window to 1"
        )
    return BatchBuilder(config, intake, processor, seed, share)


def stage_batches(
    config: BatchConfig,
    sources: Mapping[str, RecordSource],
    weights: Mapping[str, float],
    processor: Processor,
    *,
    seed: int,
    steps: int,
    share: RowShare = ALONE,
    known: KnownBad | None = None,
    report: Path | None = None,
    threads: int = 1,
    workers: int = 0,
) -> grain.IterDataset[Arrays]:
    """``stage_dataset`` built ahead by ``threads`` threads, in each of ``workers`` processes if there are any.

    Neither threads nor workers change a batch.
    """
    dataset = stage_dataset(
        config,
        sources,
        weights,
        processor,
        seed=seed,
        steps=steps,
        share=share,
        known=known,
        report=report,
    )
    return built_ahead(dataset, threads, workers, widest_bytes(config, processor, share))


def built_ahead(
    dataset: grain.MapDataset[Arrays], threads: int = 1, workers: int = 0, batch_bytes: int = 0
) -> grain.IterDataset[Arrays]:
    """What ``stage_dataset`` gives, or what is left of it (``dataset[start:]``), one batch after the other.

    Two batches a thread are ahead, or fewer where they would take more than 32 GiB of a host, but two in any case, and
    two in each worker.

    Args:
        threads: that build batches, in each of the workers if there are any.
        workers: processes; 0 for none.
        batch_bytes: of the largest batch, see ``widest_bytes``; 0 where nobody knows.
    """
    # Grain's default buffer of 500 elements is meant for records, not for batches of pixels.
    ahead = min(2 * threads, max(2, _AHEAD // max(batch_bytes, 1) // max(workers, 1)))
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    batches = dataset.to_iter_dataset(options)
    if not workers:
        return batches
    # Grain's processes read absl flags, which a program that is not an absl app never parses.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1))


def widest_bytes(config: BatchConfig, processor: Processor, share: RowShare = ALONE) -> int:
    """Bytes of this process's rows of the largest batch, without the few that say what is hidden."""

    def of_a_row(shape: Shape) -> int:
        empty = write_rows({}, [[]], processor, shape, config.rows.examples_per_row, config.visibility, truncated=False)
        return sum(array.nbytes for array in empty.values())

    return max(rows // share.count * of_a_row(Shape(rows, *sides)) for rows, *sides in config.rows.shapes)


def rejected(config: BatchConfig, source: RecordSource, processor: Processor, seed: int) -> dict[int, str]:
    """Records of ``source`` that cannot become examples, with the reason of each; to be run before training.

    Nothing is decoded: lengths come from the sizes of pictures and from the text. `intake.check` decodes as well.
    """
    reasons, source = {}, with_negatives(source, config.negatives)
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
class _Alone:
    """A draw as a batch of one, [1, 2]."""

    def __call__(self, draw: np.ndarray) -> np.ndarray:
        return draw[None]


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Parts of a batch, [n, N / n, 2], as one."""

    def __call__(self, parts: np.ndarray) -> np.ndarray:
        return parts.reshape(-1, 2)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _InWindow:
    """The draws of the window that a step belongs to."""

    windows: grain.MapDataset[np.ndarray]
    steps: int

    def __call__(self, step: int) -> np.ndarray:
        return np.asarray(self.windows[step // self.steps])
