"""Records that cannot be used: what to do with them, how many may be, and where each is named."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from cocoa_jax.data.packing import PackingError
from cocoa_jax.data.pixels import ImageError
from cocoa_jax.data.processor import ExampleError
from cocoa_jax.data.sources import RecordError

BAD = (RecordError, ImageError, ExampleError, PackingError)
"""What a record can be refused for. Anything else, a failing disk above all, is no fault of the record and stops."""

_FEWEST = 1000  # records over which the ceiling is taken at least: one bad record among the first eight is no verdict


class TooManyBad(ValueError):
    """More records cannot be used than the settings allow."""


@dataclasses.dataclass(frozen=True)
class BadConfig:
    """What happens to a record that cannot be used.

    Args:
        action: ``skip`` draws another one in its place, ``stop`` ends the run; neither ever shows a made-up picture.
        ceiling: ``skip`` stops as well when more than this share of all drawn records, of a thousand at least, is bad.
            A list of ``known`` ones that is longer, as a share of all records, is refused with either action.
        known: the file that ``cocoa data check`` wrote; its records are skipped without being read, also by ``stop``,
            and hosts need not decode each other's pictures to agree on what is bad.
    """

    action: Literal["skip", "stop"] = "stop"
    ceiling: float = 0.01
    known: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ceiling <= 1:
            raise ValueError(f"ceiling is {self.ceiling}: it is a share, from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Bad:
    """A drawn record that cannot be used.

    Args:
        source, index: which one it is.
        reason: why, in words for the user.
        step, place: the batch, or the window of batches planned together, and the place in it that it was drawn for,
            and that another takes.
    """

    source: str
    index: int
    reason: str
    step: int
    place: int


class Ledger:
    """Counts what one process drew and names each bad record once in a file of JSON lines.

    It changes no batch. Threads share it; a worker process starts its own, and none repeats what the file has.
    """

    def __init__(self, config: BadConfig, path: Path | None):
        self._config, self._path = config, path
        self._drawn = self._bad = self._read = 0
        self._named: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Ledger, (self._config, self._path)

    def note(self, drawn: int, found: Iterable[Bad]) -> None:
        """Add a batch.

        Raises:
            TooManyBad: the share of bad records is above the ceiling.
        """
        with self._lock:
            last: Bad | None = None
            self._drawn += drawn
            for bad in found:
                self._bad, last = self._bad + 1, bad
                if (bad.source, bad.index) not in self._named:
                    self._write(bad)
                    self._named.add((bad.source, bad.index))
            over = self._bad > self._config.ceiling * max(self._drawn, _FEWEST)
            if last is not None and over and self._config.action == "skip":
                raise TooManyBad(
                    f"{self._bad} of {self._drawn} records drawn cannot be used, the ceiling is a share of "
                    f"{self._config.ceiling}; the last: {last.reason}; all are in {self._path or 'no file'}: repair "
                    "the data or raise bad.ceiling"
                )

    def _write(self, bad: Bad) -> None:
        if self._path is None:
            return
        line = json.dumps(dataclasses.asdict(bad)) + "\n"
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed: one process at a time looks and writes
            self._note_others(file)
            if (bad.source, bad.index) not in self._named:
                torn = os.fstat(file).st_size > self._read  # a line that a kill cut short must not swallow this one
                os.write(file, ("\n" * torn + line).encode())
        finally:
            os.close(file)

    def _note_others(self, file: int) -> None:
        """What other processes, or an earlier run, have named since this one looked."""
        while more := os.pread(file, 2**20, self._read):
            whole = more[: more.rfind(b"\n") + 1]
            if not whole:
                return  # a line that is longer, or that a kill cut short, names nothing
            self._read += len(whole)
            for line in whole.splitlines():
                try:
                    known = json.loads(line)
                    self._named.add((known["source"], known["index"]))
                except (ValueError, KeyError, TypeError):
                    continue


@dataclasses.dataclass(frozen=True)
class KnownBad:
    """What a check of all records, with so many wrong targets of each, found; ``reasons`` by source and index."""

    fingerprint: str
    negatives: int
    checked: Mapping[str, int]
    reasons: Mapping[str, Mapping[int, str]]

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        values = {
            "fingerprint": self.fingerprint,
            "negatives": self.negatives,
            "checked": dict(self.checked),
            "bad": {name: {str(i): reason for i, reason in found.items()} for name, found in self.reasons.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        aside.write_text(json.dumps(values, indent=1))
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path, fingerprint: str, negatives: int, ceiling: float) -> KnownBad:
        """What was found in the data of this fingerprint, of which so many wrong targets are read.

        Raises:
            TooManyBad: more than the ceiling's share is bad; ValueError: no such file, or one about other data or
                fewer wrong targets.
        """
        try:
            values = json.loads(path.read_text())
            reasons = {name: {int(i): str(r) for i, r in found.items()} for name, found in values["bad"].items()}
            known = cls(values["fingerprint"], int(values["negatives"]), values["checked"], reasons)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no list of bad records ({error}): write it by `cocoa data check`") from error
        if known.fingerprint != fingerprint:
            raise ValueError(f"{path} is about data {known.fingerprint}, this is {fingerprint}: check the data again")
        if known.negatives < negatives:  # the wrong targets beyond were not looked at
            raise ValueError(
                f"{path} is of a check of {known.negatives} negatives, this reads {negatives}: check the data again"
            )
        total, bad = sum(known.checked.values()), sum(map(len, known.reasons.values()))
        if bad > ceiling * total:
            raise TooManyBad(
                f"{path}: {bad} of {total} records cannot be used, the ceiling is a share of {ceiling}: repair the "
                "data or raise bad.ceiling"
            )
        return known
