"""What has been written, line by line, so that a killed run loses and repeats nothing."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cocoa_jax.data.synthesis.filters import same

ROWS, REJECTED, RUN, MIXTURE, PICTURES = "rows.jsonl", "rejected.jsonl", "run.json", "mixture.yaml", "pictures"


class StoreError(ValueError):
    """A folder that cannot take this run's rows."""


class Store:
    """Rows and rejected answers in two files of JSON lines, pictures by their hash.

    One line is one write at the end of its file. A line that a kill cut short is removed when the folder is opened
    again: its request is sent anew. One process writes at a time.

    Raises:
        StoreError: another process writes there, or a file holds what is none of ours.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise StoreError(f"{folder}: another run writes there: wait for it or end it") from error
        self.done: set[str] = set()
        self.shown: set[tuple[str, str, str]] = set()
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self.tokens_in = self.tokens_out = self.counted = 0
        self._texts: Counter[tuple[str, str, str]] = Counter()
        self._files: dict[str, int] = {}
        for name in (ROWS, REJECTED):
            _mend(folder / name)
            for line in _lines(folder / name):
                self._note(name, line)
            self._files[name] = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def close(self) -> None:
        """What was written is on the disk."""
        for file in self._files.values():
            os.fsync(file)
            os.close(file)
        os.close(self._lock)

    def repeats(self, row: Mapping[str, Any]) -> int:
        """How many rows have the text of this one for the same prompt and language."""
        return self._texts[row["prompt"], row["language"], same(row["pos_text"])]

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        self._write(ROWS, row)

    def reject(self, row: Mapping[str, Any]) -> None:
        """Keep the reason why there is no row; ``reason`` begins with its kind and a colon."""
        self._write(REJECTED, row)

    def picture(self, name: str, data: bytes) -> str:
        """Keep the bytes of a picture; gives its path in the folder. Threads may do so at a time."""
        path = self.folder / PICTURES / name[:2] / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{name}.{os.getpid()}.{id(data)}")
            aside.write_bytes(data)
            os.replace(aside, path)
        return str(path.relative_to(self.folder))

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        written = os.write(self._files[name], line)
        if written < len(line):  # a disk that is full takes a part and refuses the rest
            os.write(self._files[name], line[written:])
        self._note(name, row)

    def _note(self, name: str, row: Mapping[str, Any]) -> None:
        self.done.add(row["task"])
        if row["picture"]:
            self.shown.add((row["picture"], row["prompt"], row["language"]))
        if row["tokens_in"] >= 0 and row["tokens_out"] >= 0:
            self.tokens_in, self.tokens_out = self.tokens_in + row["tokens_in"], self.tokens_out + row["tokens_out"]
            self.counted += 1
        if name == ROWS:
            self.rows += 1
            self._texts[row["prompt"], row["language"], same(row["pos_text"])] += 1
        else:
            self.reasons[row["reason"].split(":")[0]] += 1


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    needed = {"task", "picture", "prompt", "language", "tokens_in", "tokens_out"}
    needed |= {"pos_text"} if path.name == ROWS else {"reason"}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not needed <= row.keys():
                raise StoreError(f"{path} line {number} is no row of a synthesis: remove the line or take a new folder")
            yield row


def _mend(path: Path) -> None:
    """Remove what follows the last line's end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**16)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                file.truncate(start + place + 1)
                return
            end = start
        file.truncate(0)
