"""Folders on this machine and in buckets (``gs://...``), by the same names and verbs.

A bucket has no appending and no library that opens a tokenizer there: logs are written to a folder of this machine and
carried over at every checkpoint, and small files are fetched before they are opened.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from etils import epath


def is_remote(path: str | Path) -> bool:
    """Whether a path names a bucket."""
    return "://" in str(path)


def folder_at(path: str | Path) -> Any:
    """A path with pathlib's verbs, whatever it names; needs the extra ``gcs`` for a bucket.

    Plain ``Path`` would make one slash of the two that follow ``gs:``.
    """
    return epath.Path(path) if is_remote(path) else Path(path)


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; a bucket that cannot be asked now is an error, for which ``is_dir`` says no."""
    folder = folder_at(path)
    return bool(folder.exists() if is_remote(path) else folder.is_dir())


def twin(path: str | Path) -> Path:
    """The folder of this machine that stands in for ``path`` where files must be local; ``path`` itself if it is."""
    if not is_remote(path):
        return Path(path)
    name = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"cocoa-{os.getpid()}" / name


def fetch(path: str | Path) -> Path:
    """The files of a folder in a bucket, brought to its twin; a local folder stays where it is."""
    local = twin(path)
    if is_remote(path):
        shutil.rmtree(local, ignore_errors=True)
        local.mkdir(parents=True)
        for file in folder_at(path).iterdir():
            with suppress(FileNotFoundError):  # an object that marks a folder is listed in it by the folder's own name
                if not file.stat().is_directory:  # `is_file` would not tell one from a network that fails
                    (local / file.name).write_bytes(file.read_bytes())
    return local


def log_file(folder: str | Path, name: str) -> Path:
    """A file of this machine to which lines are added until ``carry``: what a bucket holds of it is fetched first."""
    local = twin(folder) / name
    if is_remote(folder):
        local.parent.mkdir(parents=True, exist_ok=True)
        if (before := folder_at(folder) / name).exists():
            local.write_bytes(before.read_bytes())
    return local


def carry(path: str | Path, sent: dict[Path, tuple[int, int]] | None = None) -> None:
    """Bring all that lies in the twin of a folder to it, file by file; nothing where it is its own twin.

    Args:
        sent: size and time of change of files that were brought before, which are left out, and are added here.
    """
    local, sent = twin(path), {} if sent is None else sent
    if local == Path(path) or not local.exists():
        return
    for file in sorted(local.rglob("*")):
        if file.is_file():
            state = file.stat()
            now = state.st_size, state.st_mtime_ns
            if sent.get(file) == now:
                continue
            to = folder_at(path) / str(file.relative_to(local))
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())
            sent[file] = now
