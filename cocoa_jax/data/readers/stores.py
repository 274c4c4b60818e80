"""Pictures by path: in a folder or in a zip, never outside of it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cocoa_jax.data.sources import RecordError, SourceError

LARGEST_FILE = 2**26  # bytes of one encoded picture; real ones have a few megabytes
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DRIVE = re.compile(r"[A-Za-z]:")
_ENOUGH = 1000  # paths found in a zip that say how those of its table are to be read
_STORED, _DEFLATED, _ENCRYPTED = 0, 8, 1


class MissingPicture(RecordError):
    """A path that the store does not hold."""


class PictureStore(Protocol):
    """Encoded pictures by the path that a row gives; picklable, safe to share between threads."""

    @property
    def where(self) -> str:
        """What it is called in an error."""
        ...

    def read(self, path: str) -> bytes:
        """The bytes at ``path``.

        Raises:
            RecordError: a missing or a too large file, or a path that leaves the store.
        """
        ...

    def settle(self, paths: Callable[[], Iterable[str]]) -> None:
        """Find out from the paths of a table, in their order, under which names a zip holds them."""
        ...

    def fingerprint(self) -> str: ...

    def stamp(self, path: str) -> str:
        """Changes with the file at ``path`` where `fingerprint` does not; "" if it does, or nothing is there."""
        ...


def open_store(places: Sequence[Path]) -> PictureStore:
    """Folders and zips; a picture is taken from the first that holds it.

    Raises:
        SourceError: a place that does not exist or is no zip.
    """
    stores: list[PictureStore] = []
    for place in places:
        if place.is_dir():
            stores.append(FolderStore(place))
        elif place.is_file():
            stores.append(ZipStore(place))
        else:
            raise SourceError(f"{place} is neither a folder nor a zip: correct `images`")
    return stores[0] if len(stores) == 1 else FirstOf(tuple(stores))


def inside(path: str) -> tuple[str, ...]:
    """The parts of a relative path.

    Raises:
        RecordError: it is empty, absolute, or leaves its folder.
    """
    parts = tuple(part for part in path.replace("\\", "/").split("/") if part not in ("", "."))
    if "\0" in path or path.startswith(("/", "\\")) or ".." in parts or _DRIVE.match(path):
        raise RecordError(f"path {path!r} leaves the folder of pictures: give one relative to it")
    if not parts:
        raise RecordError(f"path {path!r} names no file: give one relative to the folder of pictures")
    return parts


class FolderStore:
    """Files below a folder; links that lead out of it are refused."""

    def __init__(self, root: Path):
        self._root = os.path.realpath(root)

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderStore, (Path(self._root),)

    @property
    def where(self) -> str:
        return self._root

    def read(self, path: str) -> bytes:
        parts = inside(path)
        try:
            real = os.path.realpath(os.path.join(self._root, *parts))
            if os.path.commonpath([real, self._root]) != self._root:
                raise RecordError(f"path {path!r} is a link out of the folder of pictures: copy the file into it")
            # A pipe or a device would wait for ever when it is opened.
            found = os.stat(real)
            if not stat.S_ISREG(found.st_mode):
                raise RecordError(f"path {path!r} is no file: give a picture")
            if found.st_size > LARGEST_FILE:
                raise RecordError(f"path {path!r}: {found.st_size} bytes, at most {LARGEST_FILE} are read: shrink it")
            with open(real, "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingPicture(f"path {path!r}: not in {self.where}: fetch it or correct `images`") from error
        except PermissionError as error:
            raise RecordError(f"path {path!r}: no permission to read it: change its mode") from error
        except (OSError, ValueError) as error:
            if isinstance(error, RecordError):
                raise
            # A name that no file can have is the row's fault; a disk that fails is not, and must stop the run.
            if isinstance(error, UnicodeError) or len(path) > 255:
                raise RecordError(f"path {path[:80]!r}... cannot name a file ({error}): correct the row") from error
            raise

    def settle(self, paths: Callable[[], Iterable[str]]) -> None:
        """A folder lacks nothing."""

    def fingerprint(self) -> str:
        """Nothing of a folder: to hash a million files would take longer than to train a while on them."""
        return "folder"

    def stamp(self, path: str) -> str:
        """Size and time of change."""
        try:
            found = os.stat(os.path.join(self._root, *inside(path)))
        except (OSError, ValueError):
            return ""
        return f"{found.st_size} {found.st_mtime_ns}"


class ZipStore:
    """Members of a zip, read at random; 56 bytes of memory a member instead of zipfile's half a kilobyte.

    A row's path may have leading folders that the zip lacks, and the other way round: published zips were made at
    different levels. `settle` fixes both for all rows, so that no two paths are one member.

    Args:
        lacks: leading folders of every path that the zip does not have.
        under: its one folder, with a slash, where the paths do not have it.
    """

    def __init__(self, path: Path, lacks: tuple[str, ...] = (), under: str = ""):
        self._path, self._lacks, self._under = path, lacks, under
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except zipfile.BadZipFile as error:
            raise SourceError(f"{path} is no whole zip ({error}): fetch it again") from error
        except NotImplementedError as error:
            # zipfile's own error for a member whose "version needed to extract" is beyond what Python can unpack; the
            # file is whole, so the remedy is not that of a damaged one.
            raise SourceError(f"{path}: {error}: pack it again with a plain zip") from error
        except OSError as error:
            raise SourceError(f"{path} cannot be read ({error}): correct the path or its mode") from error
        self._keys = np.array([_key(member.filename) for member in members], np.uint64)
        order = np.argsort(self._keys, kind="stable")
        self._keys = self._keys[order]
        fields = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type, m.flag_bits) for m in members]
        self._members = np.array(fields, np.int64).reshape(-1, 6)[order]
        tops = {member.filename.partition("/")[0] for member in members if "/" in member.filename}
        self._unders = ("", *(f"{top}/" for top in tops if len(tops) == 1))  # files beside the folder change nothing
        digest = hashlib.blake2b(self._keys.tobytes(), digest_size=16)
        digest.update(self._members[:, 1:4].tobytes())
        self._digest = digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipStore, (self._path, self._lacks, self._under)

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def where(self) -> str:
        lacking = f" (without the leading {'/'.join(self._lacks)}/ of paths)" if self._lacks else ""
        return f"{self._path.name}{lacking}"

    def read(self, path: str) -> bytes:
        place = self.place(inside(path))
        if place is None:
            raise MissingPicture(f"path {path!r}: not in {self.where}: fetch it or correct `images`")
        return self._member(self._members[place], path)

    def place(self, parts: tuple[str, ...]) -> int | None:
        """The number of the member that a path means; None: of none."""
        skip = len(self._lacks)
        return self._find(self._under + "/".join(parts[skip:])) if parts[:skip] == self._lacks else None

    def _find(self, name: str) -> int | None:
        """The number of the member that is called so."""
        key = np.uint64(_key(name))
        place = int(np.searchsorted(self._keys, key))
        return place if place < len(self._keys) and self._keys[place] == key else None

    def settle(self, paths: Callable[[], Iterable[str]]) -> None:
        """Every path lacks, and has too much, what most of the first ones found in the zip do."""
        self._settle(paths(), lambda parts: range(len(parts)))

    def settle_by_name(self, paths: Callable[[], Iterable[str]]) -> None:
        """As `settle`, by whole paths and those through a folder called like the zip: others may mean another zip."""
        self._settle(
            paths(), lambda parts: (0, *(n for n, part in enumerate(parts[:-1], 1) if part == self._path.stem))
        )

    def _settle(self, paths: Iterable[str], skips: Callable[[tuple[str, ...]], Iterable[int]]) -> None:
        # Most of many, since one alone may be found by accident: where its own picture is missing, as another's.
        ways: Counter[tuple[tuple[str, ...], str]] = Counter()
        found: set[tuple[str, ...]] = set()
        for path in paths:
            try:
                parts = inside(path)
            except RecordError:
                continue
            if parts in found:
                continue
            names = [(parts[:n], under, under + "/".join(parts[n:])) for n in skips(parts) for under in self._unders]
            if fit := [(lacks, under) for lacks, under, name in names if self._find(name) is not None]:
                ways.update(fit)
                found.add(parts)
            if len(found) == _ENOUGH:
                break
        if ways:
            self._lacks, self._under = max(ways, key=ways.__getitem__)  # of equally many the first

    def _member(self, fields: np.ndarray, path: str) -> bytes:
        offset, packed, size, crc, method, flags = (int(field) for field in fields)
        if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
            raise RecordError(f"path {path!r} is encrypted or packed by method {method}: pack the zip again")
        if max(size, packed) > LARGEST_FILE:
            raise RecordError(f"path {path!r}: {size} bytes unpacked, at most {LARGEST_FILE} are read: leave it out")
        header = os.pread(self._file, _LOCAL_HEADER.size, offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise RecordError(f"path {path!r}: {self._path.name} is damaged there: fetch it again")
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        data = os.pread(self._file, packed, offset + _LOCAL_HEADER.size + name_length + extra_length)
        if method == _DEFLATED:
            try:  # the header may lie: no more than it announces is unpacked
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise RecordError(f"path {path!r}: damaged in {self._path.name} ({error}): fetch it again") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise RecordError(f"path {path!r}: not the {size} bytes that {self._path.name} lists: fetch it again")
        return data

    def fingerprint(self) -> str:
        """Over names, sizes and checksums of all members."""
        return self._digest

    def stamp(self, path: str) -> str:
        return ""


class FirstOf:
    """Several stores; the first that holds a path gives it."""

    def __init__(self, stores: tuple[PictureStore, ...]):
        self._stores = stores

    def __reduce__(self) -> tuple[Any, ...]:
        return FirstOf, (self._stores,)

    @property
    def where(self) -> str:
        return ", ".join(store.where for store in self._stores)

    def read(self, path: str) -> bytes:
        for store in self._stores:
            try:
                return store.read(path)
            except MissingPicture:
                continue
        zips = any(isinstance(store, ZipStore) for store in self._stores)
        named = ", or call a zip like the folder of the paths that it lacks" if zips else ""
        raise MissingPicture(f"path {path!r}: not in {self.where}: fetch it or correct `images`{named}")

    def settle(self, paths: Callable[[], Iterable[str]]) -> None:
        for store in self._stores:
            if isinstance(store, ZipStore):
                store.settle_by_name(paths)

    def fingerprint(self) -> str:
        return "+".join(store.fingerprint() for store in self._stores)

    def stamp(self, path: str) -> str:
        return " ".join(store.stamp(path) for store in self._stores)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
