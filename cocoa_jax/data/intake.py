"""Drawn records -> examples; another record is drawn in the place of one that cannot be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cocoa_jax.data.bad import BAD, Bad, BadConfig, KnownBad, Ledger
from cocoa_jax.data.example import Example
from cocoa_jax.data.masking import Purpose, example_rng
from cocoa_jax.data.mixture import with_negatives
from cocoa_jax.data.packing import PackingError, RowsConfig, check_fits
from cocoa_jax.data.pixels import ImageError, decode
from cocoa_jax.data.processor import ExampleError, Processor
from cocoa_jax.data.sources import Image, RecordError

if TYPE_CHECKING:
    from cocoa_jax.data.batch_config import BatchConfig
    from cocoa_jax.data.pairs import RecordSource
    from cocoa_jax.data.sources import Content, Record

Use = TypeVar("Use")
_TRIES = 64  # records drawn in a row that are all bad: the ceiling stops a data set long before, but not a small one


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a place of a batch holds: a record and its examples, query first."""

    record: Record
    examples: tuple[Example, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Intake:
    """Draws -> records and examples: a function of (seed, step) and of the data alone.

    Args:
        known: what a check of all records found; others stand in for these, whatever the action.
        verify: decode every picture before its record is taken. Hosts decode their own rows only, so without a
            check all of them must look at all pictures to agree on what is bad.
    """

    config: BatchConfig
    sources: tuple[RecordSource, ...]
    processor: Processor
    seed: int
    ledger: Ledger
    known: KnownBad | None = None
    verify: bool = False

    def take(self, draws: np.ndarray, step: int) -> tuple[list[Taken], list[Bad]]:
        """The record of every draw [N, 2] (source, index), or the one in its place, and those that were replaced.

        Raises:
            RecordError, ImageError, ExampleError, PackingError: a bad record, and the settings say stop.
        """
        found: list[Bad] = []
        taken = []
        for place, (kind, index) in enumerate(draws):
            build = partial(self._drawn, step, place, int(kind))
            taken.append(self.usable(step, place, int(kind), int(index), found, build))
        return taken, found

    def note(self, places: int, found: list[Bad]) -> None:
        """Count what was drawn until so many places held a record; once a batch.

        Raises:
            TooManyBad: more bad ones than the settings allow.
        """
        self.ledger.note(places + len(found), found)

    def one(self, step: int, place: int, kind: int, index: int) -> Taken:
        """The record of one draw, which is known to be good."""
        return self._drawn(step, place, kind, index, 0)

    def usable(
        self, step: int, place: int, kind: int, index: int, found: list[Bad], use: Callable[[int, int], Use]
    ) -> Use:
        """What ``use(index, attempt)`` makes of a drawn record, or of the first of those drawn in its place.

        Args:
            found: the bad ones are added, those of the list, which are never read, and those that ``use`` refuses.
        """
        source = self.sources[kind]
        listed = {} if self.known is None else self.known.reasons.get(source.name, {})
        for attempt in range(_TRIES):
            if attempt:
                index = int(self._rng(step, place, attempt).integers(len(source)))
            if (reason := listed.get(index)) is None:
                try:
                    return use(index, attempt)
                except BAD as error:
                    if self.config.bad.action == "stop":
                        raise
                    reason = str(error)
            found.append(Bad(source.name, index, reason, step, place))
        self.note(place, found)
        raise RecordError(f"{source.name}: {_TRIES} records in a row cannot be used, the last: {found[-1].reason}")

    def _drawn(self, step: int, place: int, kind: int, index: int, attempt: int) -> Taken:
        return self._built(self.sources[kind], index, self._rng(step, place, attempt))

    def _rng(self, step: int, place: int, attempt: int) -> np.random.Generator:
        if not attempt:
            return example_rng(self.seed, step, place, Purpose.RECORD)
        return np.random.default_rng((self.seed, step, place, int(Purpose.RECORD), attempt))

    def _built(self, source: RecordSource, index: int, rng: np.random.Generator) -> Taken:
        record = source.record(index, rng)
        taken = Taken(record, examples_of(record, self.config, self.processor))
        if self.verify:
            decode_all(taken)
        return taken


def arranged(taken: Sequence[Taken]) -> dict[int, Example]:
    """The examples of a batch in the order of ``example``: queries, targets, negatives."""
    parts = [one.examples for one in taken]
    order = [part[0] for part in parts]
    order += [part[1] for part in parts if len(part) > 1]
    order += [example for part in parts for example in part[2:]]
    return dict(enumerate(order))


def examples_of(record: Record, config: BatchConfig, processor: Processor) -> tuple[Example, ...]:
    """The examples of a record: one to reconstruct, or query, target and up to so many negatives.

    Nothing is decoded.

    Raises:
        ExampleError, ImageError, PackingError: naming the record that cannot become an example.
    """
    rows = config.rows
    if config.stage == "warmup":
        return (_checked(record, rows, processor.warmup, record.query),)
    if config.stage == "bridge":
        build = partial(processor.bridge, pictures=config.rebuilds_pictures)
        return (_checked(record, rows, build, record.query, record.target),)
    contents = (record.query, record.target, *record.negatives[: config.negatives])
    return tuple(_checked(record, rows, processor.embedding, content) for content in contents)


def decode_all(taken: Taken) -> None:
    """Decode every picture of a record and keep none.

    Raises:
        ImageError: naming the record and its first picture that cannot be decoded.
    """
    for example in taken.examples:
        for shown in example.images:
            if not isinstance(shown, Image):
                continue  # videos come decoded
            try:
                decode(shown)
            except ImageError as error:
                raise ImageError(f"{taken.record.dataset} {taken.record.id}: {error}") from error


def check(
    config: BatchConfig, sources: Mapping[str, RecordSource], processor: Processor, seed: int, threads: int = 1
) -> Iterator[tuple[str, int, str]]:
    """Read and decode every record; gives (source, index, reason), the reason "" for a good one, in order."""
    verifying = dataclasses.replace(config, bad=BadConfig("stop"))
    sources = {name: with_negatives(source, config.negatives) for name, source in sources.items()}

    def one(name: str, index: int) -> tuple[str, int, str]:
        intake = Intake(verifying, (sources[name],), processor, seed, Ledger(verifying.bad, None), verify=True)
        try:
            intake.take(np.array([[0, index]]), 0)
        except BAD as error:
            return name, index, str(error)
        return name, index, ""

    with ThreadPoolExecutor(threads) as pool:
        for name in sorted(sources):
            for start in range(0, len(sources[name]), 1024):  # a window at a time: results of millions are not kept
                window = range(start, min(start + 1024, len(sources[name])))
                yield from pool.map(one, [name] * len(window), window)


def _checked(record: Record, rows: RowsConfig, build: Callable[..., Example], *contents: Content) -> Example:
    """Build one example of ``record``, naming the record in whatever is wrong with it."""
    try:
        example = build(*contents, room=rows.widest.tokens)
        check_fits(len(example.tokens), example.patches, rows, "the example")
    except (ExampleError, ImageError, PackingError) as error:
        raise type(error)(f"{record.dataset} {record.id}: {error}") from error
    return example
