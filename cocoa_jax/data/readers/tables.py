"""Rows of JSON and Parquet files by index, without holding the files in memory."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64

from cocoa_jax.data.sources import RecordError, SourceError

_CHUNK = 2**23  # bytes read at once when a file is scanned
_LONGEST_LINE = 2**26  # bytes; a line of more is damage, or a picture that belongs into a file of its own
_CACHED = 2**27  # bytes of Parquet row groups that a process keeps decoded
_HASHED_WHOLE = 2**30  # files of more bytes are hashed in samples
_MARK = b"\xef\xbb\xbf"  # of the order of bytes, which UTF-8 has no need of
_SAMPLES, _SAMPLE = 64, 2**16

Row = dict[str, Any]


class Table(Protocol):
    """Rows by index; safe to share between threads, and pickled as its paths."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """The row's values by column.

        Raises:
            RecordError: this row cannot be read; others may be.
        """
        ...

    def column(self, name: str) -> Iterator[Any]:
        """The values of one column in order, and nothing else of the rows; a RecordError for one that is unreadable."""
        ...

    def fingerprint(self) -> str:
        """Changes with the rows."""
        ...


def open_table(paths: Sequence[Path], columns: Sequence[str]) -> Table:
    """The rows of files of one kind, one file after the other.

    Args:
        paths: ``.parquet``, ``.jsonl`` or ``.json`` (an array, or lines).
        columns: what is read; in Parquet every file must have them.
    Raises:
        SourceError: no files, files of several kinds, or one that is not what its name says.
    """
    kinds = {path.suffix.lower() for path in paths}
    if kinds == {".parquet"}:
        return ParquetTable(paths, columns)
    if kinds and kinds <= {".json", ".jsonl", ".ndjson"}:
        return JsonTable(paths)
    found = ", ".join(sorted(kinds)) or "no files"
    raise SourceError(f"{[str(p) for p in paths[:3]]}: {found}, expected .parquet alone, or .json and .jsonl: rename")


class JsonTable:
    """Objects of JSON lines or of JSON arrays.

    Lines stay on disk, with 16 bytes of memory a row. An array has no rows to seek, so its bytes are kept.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = tuple(paths)
        self._files: list[int | bytes] = []
        spans, digests = [], []
        for path in self._paths:
            try:
                start, end, digest, kept = _scan_json(path)
                self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC) if kept is None else kept)
            except OSError as error:
                raise SourceError(f"{path} cannot be read ({error.strerror}): correct the path") from error
            spans.append(np.stack([start, end], axis=1))
            digests.append(digest)
        self._spans = np.concatenate(spans) if spans else np.zeros((0, 2), np.int64)
        self._ends = np.cumsum([len(part) for part in spans])
        self._digest = hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTable, (self._paths,)

    def __del__(self) -> None:
        for file in self._files:
            if isinstance(file, int):
                os.close(file)

    def __len__(self) -> int:
        return len(self._spans)

    def row(self, index: int) -> Row:
        number = int(np.searchsorted(self._ends, index, side="right"))
        start, end = (int(n) for n in self._spans[index])
        where = f"{self._paths[number].name} row {index - (int(self._ends[number - 1]) if number else 0)}"
        if end - start > _LONGEST_LINE:
            raise RecordError(f"{where}: {end - start} bytes, at most {_LONGEST_LINE} are read: split it")
        file = self._files[number]
        line = os.pread(file, end - start, start) if isinstance(file, int) else file[start:end]
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: no UTF-8 ({error.reason} at byte {error.start}): encode it again") from error
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: no JSON ({error}): give one object a line") from error
        if not isinstance(value, dict):
            raise RecordError(f"{where}: a {type(value).__name__}, expected an object of columns")
        return value

    def column(self, name: str) -> Iterator[Any]:
        for index in range(len(self)):
            try:
                yield self.row(index).get(name)
            except RecordError as error:
                yield error

    def fingerprint(self) -> str:
        return self._digest


def _scan_json(path: Path) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], str, bytes | None]:
    """Where rows begin and end, a hash of the file, and the bytes that they are in, None for the file itself."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        head = file.read(64)
        marked, head = head.startswith(_MARK), head.removeprefix(_MARK).lstrip(b" \t\r\n")
        file.seek(0)
        if head.startswith(b"["):
            data = file.read()
            digest.update(data)
            lines = _array_lines(data, path)
            ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
            return ends - [len(line) for line in lines], ends, digest.hexdigest(), b"".join(lines)
        breaks, place = [np.array([-1])], 0
        last = b"\n"
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + place)
            place, last = place + len(chunk), chunk[-1:]
        if last != b"\n":
            breaks.append(np.array([place]))
    found = np.concatenate(breaks).astype(np.int64)
    start, end = found[:-1] + 1, found[1:]
    if marked and len(start):
        start[0] = len(_MARK)
    full = end - start > 1  # "\n" and "\r\n" alone are no rows
    return start[full], end[full], digest.hexdigest(), None


def _array_lines(data: bytes, path: Path) -> list[bytes]:
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: no JSON ({error}): give an array of objects, or one object a line") from error
    return [json.dumps(value).encode() for value in values]


class ParquetTable:
    """Columns of Parquet files; whole row groups are decoded and the last few are kept.

    One random row costs one row group. Files with pictures inside should have groups of few rows (``row_group_size``
    when they are written), or be turned into ArrayRecord first.
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise SourceError(
                f"{paths[0]} is Parquet, which needs pyarrow: pip install '.[data]' in the clone of cocoa_jax"
            ) from error

        self._paths, self._columns = tuple(paths), tuple(dict.fromkeys(columns))
        self._files, rows = [], []
        self._groups: list[tuple[int, int]] = []
        for number, path in enumerate(self._paths):
            try:
                file = parquet.ParquetFile(path, memory_map=True)
            except (pyarrow.ArrowException, OSError) as error:
                raise SourceError(f"{path} is no readable Parquet ({error}): fetch it again") from error
            missing = sorted(set(self._columns) - set(file.schema_arrow.names))
            if missing:
                raise SourceError(
                    f"{path} has the columns {file.schema_arrow.names}, not {missing}: correct `columns` or the file"
                )
            self._files.append(file)
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._groups += [(number, group) for group in range(len(counts))]
            rows += counts
        self._ends = np.cumsum(rows, dtype=np.int64)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetTable, (self._paths, self._columns)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> Row:
        group = int(np.searchsorted(self._ends, index, side="right"))
        inside = index - (int(self._ends[group - 1]) if group else 0)
        table = self._group(group)
        row: Row = {}
        for name in self._columns:
            try:
                row[name] = table.column(name)[inside].as_py()
            except UnicodeDecodeError as error:
                where = f"{self._paths[self._groups[group][0]].name} row {index}"
                raise RecordError(
                    f"{where}: {name} is no UTF-8 ({error.reason} at byte {error.start}): encode it again"
                ) from error
        return row

    def column(self, name: str) -> Iterator[Any]:
        for number in range(len(self._groups)):
            try:
                with self._lock:
                    values = self._read(number, [name]).column(name)
            except RecordError as error:
                yield from [error] * int(self._ends[number] - (self._ends[number - 1] if number else 0))
                continue
            for value in values:
                try:
                    yield value.as_py()
                except UnicodeDecodeError as error:
                    yield RecordError(f"{name} is no UTF-8 ({error.reason})")

    def fingerprint(self) -> str:
        return hashlib.blake2b("".join(map(hash_file, self._paths)).encode(), digest_size=16).hexdigest()

    def _read(self, number: int, columns: Sequence[str]) -> Any:
        import pyarrow

        file, group = self._groups[number]
        try:
            return self._files[file].read_row_group(group, columns=list(columns), use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            where = f"{self._paths[file].name} row group {group}"
            raise RecordError(f"{where}: damaged ({error}): fetch the file again") from error

    def _group(self, number: int) -> Any:
        with self._lock:  # a file's reader is not made for several threads
            table = self._kept.pop(number, None)
            if table is None:
                table = self._read(number, self._columns)
            self._kept[number] = table
            size = sum(kept.nbytes for kept in self._kept.values())
            while size > _CACHED and len(self._kept) > 1:
                size -= self._kept.popitem(last=False)[1].nbytes
            return table


def hash_file(path: Path) -> str:
    """A hash of a file's bytes; of a file beyond 1 GiB only of its size, 64 evenly spaced samples and its end."""
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        else:
            for start in np.linspace(0, size - _SAMPLE, _SAMPLES, dtype=np.int64):
                file.seek(int(start))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
