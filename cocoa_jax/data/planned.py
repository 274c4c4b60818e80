"""Batches planned from stored lengths: rows are known before any record is read, and a process reads its own alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int64

from cocoa_jax.data.batches import choose, flat_index, held_places, hide, in_places, numbered_keys
from cocoa_jax.data.mixture import CappedSource, NamedSource
from cocoa_jax.data.packing import PackingError, RowShare, plan_batch
from cocoa_jax.data.prepared import Lengths, PreparedSource
from cocoa_jax.data.readers.stages import StagedSource
from cocoa_jax.data.rows import Arrays, write_rows
from cocoa_jax.data.sources import RecordError

if TYPE_CHECKING:
    from cocoa_jax.data.bad import Bad
    from cocoa_jax.data.batch_config import BatchConfig
    from cocoa_jax.data.example import Example
    from cocoa_jax.data.intake import Intake
    from cocoa_jax.data.pairs import RecordSource
    from cocoa_jax.data.processor import Processor
    from cocoa_jax.data.sources import Record


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StoredLengths:
    """The stored lengths of a source's records.

    Args:
        place: where the record of each index is stored; None where it is the index.
    """

    source: PreparedSource
    place: Int64[np.ndarray, " n"] | None

    @property
    def lengths(self) -> Lengths:
        """Read by each process when it first needs them."""
        return self.source.lengths

    def stored(self, index: int) -> int:
        """Where the record at ``index`` is stored."""
        return index if self.place is None else int(self.place[index])


def stored_lengths(source: RecordSource, config: BatchConfig, processor: Processor) -> StoredLengths | None:
    """The stored lengths of ``source``; None where it has none, or not those of this processor and these rows."""
    prepared, place = _prepared(source)
    if prepared is None or prepared.statistics["processor"] != processor.fingerprint():
        return None
    # A longer text would be cut to the row, and its length with it.
    table = {"warmup": prepared.lengths.warmup, "bridge": prepared.lengths.bridge}.get(
        config.stage, np.concatenate([prepared.lengths.contrastive.reshape(-1, 4), prepared.lengths.negatives])
    )
    widest = config.rows.widest
    fits = (table[:, :2].max(axis=0, initial=0) <= (widest.tokens, widest.patches)).all()
    return StoredLengths(prepared, place) if fits else None


def shrunk(sources: Iterable[RecordSource], processor: Processor) -> list[str]:
    """Names of prepared data sets whose pictures were made smaller than this processor reads them."""
    found = []
    for source in (prepared for prepared, _ in map(_prepared, sources) if prepared is not None):
        largest = source.statistics["pictures"]["source"].get("most", 0)  # no pictures have none
        built = source.statistics.get("max_pixels", largest)  # builds of earlier versions do not say
        if built < min(processor.pixels.max_pixels, largest):
            found.append(source.name)
    return found


def _prepared(source: RecordSource) -> tuple[PreparedSource | None, Int64[np.ndarray, " n"] | None]:
    """The prepared data in ``source``, if there are any, and where the record of each index is stored."""
    place = None
    while not isinstance(source, PreparedSource):
        if isinstance(source, CappedSource):
            place = source.kept if place is None else source.kept[place]
        elif not isinstance(source, NamedSource | StagedSource):
            return None, None
        source = source.source
    return source, place


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PlannedBuilder:
    """(step, [N, 2] of source and record) -> batch; with a window, N records of all its steps.

    It builds what ``BatchBuilder`` builds.
    """

    config: BatchConfig
    intake: Intake
    lengths: tuple[StoredLengths, ...]
    processor: Processor
    seed: int
    share: RowShare

    def __call__(self, step: int, draws: np.ndarray) -> Arrays:
        config = self.config
        window, turn = divmod(step, config.rows.window)
        draws, table, bad = self._useful(draws, window)
        if not turn:  # once for all steps of the window
            self.intake.note(len(draws), bad)
        owner, part = _arrangement([len(found) for found in table])
        parts = np.stack([table[record][place] for record, place in zip(owner, part, strict=True)])
        allowed = {i: _allowed(*entry) for i, entry in enumerate(parts[:, [0, 2, 3]].tolist())}
        hidden, dropped = choose(config, allowed, self.seed, window)
        masked = [len(hidden.get(i, ())) for i in range(len(parts))]
        lengths = np.column_stack([parts[:, :2], masked]).astype(np.int64)
        shape, plan = plan_batch(lengths, config.rows)
        plan = plan[turn :: config.rows.window]
        rows = plan + [[] for _ in range(shape.rows - len(plan))]
        local = [rows[row] for row in self.share.of(shape.rows)]
        examples = self._read(draws, window, [(i, owner[i], part[i]) for row in local for i in row], lengths)
        slots, truncated = config.rows.examples_per_row, config.stage == "bridge"
        batch = write_rows(examples, local, self.processor, shape, slots, config.visibility, truncated)
        hide(batch, config, self.processor, examples, local, hidden, self.seed, window)
        if config.rows.window == 1:
            held = held_places([len(found) - 2 for found in table], config.negatives)
            batch["example"] = in_places(flat_index(rows, len(parts), slots), held)
        else:  # their number varies and a batch must not; stages 1 and 2 never ask
            batch["example"] = np.full(shape.rows * slots, -1, np.int32)
        if config.stage == "contrastive":
            batch |= self._keys(draws, held)
        kind = int(draws[0, 0]) if config.stage == "contrastive" and config.interleave == 1 else -1
        extra = 0 if shape in config.rows.shapes else shape.rows - config.rows.widest.rows
        used = [i for row in plan for i in row]
        tokens, patches, _ = lengths[used].sum(axis=0)
        whole = (0, 0) if turn else (len(bad), dropped)  # of all steps of the window: told by its first alone
        batch["stats"] = np.array([kind, len(plan), len(used), tokens, patches, extra, *whole], np.int32)
        return batch

    def records(self, step: int, draws: np.ndarray) -> list[Record]:
        """The records that a batch is built of; with a window, those of all its steps."""
        window = step // self.config.rows.window
        chosen = self._useful(draws, window)[0]
        return [self.intake.one(window, place, *map(int, draw)).record for place, draw in enumerate(chosen)]

    def _useful(self, draws: np.ndarray, window: int) -> tuple[np.ndarray, list[np.ndarray], list[Bad]]:
        """Draws, the stored lengths [x, 4] of each, and the records that others stand in for."""
        chosen, table = draws.copy(), []
        bad: list[Bad] = []
        for place, (kind, index) in enumerate(draws):
            measure = partial(self._measured, int(kind))
            chosen[place, 1], found = self.intake.usable(window, place, int(kind), int(index), bad, measure)
            table.append(found)
        return chosen, table, bad

    def _measured(self, kind: int, index: int, _: int) -> tuple[int, np.ndarray]:
        config, known = self.config, self.lengths[kind]
        found = known.lengths.examples(known.stored(index), config.stage, config.negatives)
        if (found[:, 0] < 0).any():
            raise RecordError(
                f"{known.source.name} record {index} is of no use to stage {config.stage!r}: "
                "leave its data set out of the stage or set bad.action to skip"
            )
        return index, found

    def _read(
        self, draws: np.ndarray, window: int, wanted: list[tuple[int, int, int]], lengths: np.ndarray
    ) -> dict[int, Example]:
        """The examples that this process writes.

        Raises:
            PackingError: one is longer than it was when it was stored.
        """
        taken = {}
        for place in sorted({int(owner) for _, owner, _ in wanted}):
            taken[place] = self.intake.one(window, place, *map(int, draws[place]))
        examples = {i: taken[int(owner)].examples[part] for i, owner, part in wanted}
        for i, example in examples.items():
            if (len(example.tokens), example.patches) != tuple(lengths[i, :2]):
                raise PackingError(
                    f"example {i} has {len(example.tokens)} tokens and {example.patches} patches, stored are "
                    f"{lengths[i, :2].tolist()}: build the data again"
                )
        return examples

    def _keys(self, draws: np.ndarray, held: Bool[np.ndarray, "N K"]) -> Arrays:
        targets, shown, wrong = [], [], []
        for (kind, index), count in zip(draws, held.sum(axis=1), strict=True):
            known = self.lengths[kind]
            place, lengths = known.stored(int(index)), known.lengths
            first = int(lengths.first_negative[place])
            targets.append(lengths.keys[place, 0])
            shown.append(lengths.keys[place, 1])
            wrong += lengths.negative_keys[first : first + count].tolist()
        keys = np.array([*targets, *wrong], np.uint64)
        return numbered_keys(keys, np.array(shown, np.uint64), np.uint64(0), held)


def _arrangement(each: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which record each example belongs to and which part it is of it: queries, targets, then wrong targets."""
    first = min(2, each[0])
    order = [(record, part) for part in range(first) for record in range(len(each))]
    order += [(record, part) for record, count in enumerate(each) for part in range(first, count)]
    owner, part = np.array(order).T
    return owner, part


def _allowed(tokens: int, first: int, count: int) -> np.ndarray:
    able = np.zeros(tokens, bool)
    able[first : first + count] = True
    return able
