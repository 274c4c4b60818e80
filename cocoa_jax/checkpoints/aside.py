"""Folders that appear whole or not at all: written aside, flushed, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cocoa_jax.checkpoints.causes import NO_ROOM
from cocoa_jax.checkpoints.errors import CheckpointError


def require_free(folder: Path) -> None:
    """Refuse a destination that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty: give another destination or remove it")


@contextmanager
def written_aside(folder: Path, size: int) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` when it is whole and is removed when it is not.

    A killed process leaves ``.NAME.partial`` beside the destination, which the next attempt removes.

    Args:
        size: bytes that will be written, for which there must be room.

    Raises:
        CheckpointError: the destination is taken, or the disk is too small.
    """
    require_free(folder)
    place = folder.resolve()  # a link stays what it is, and "." gets a name
    if place == Path.cwd():
        raise CheckpointError(f"{folder} is the folder you are in, which is to be replaced: give it from outside")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made ({error.strerror}): give another destination") from error
    _check_space(place.parent, size)
    partial = place.parent / f".{place.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        partial.replace(place)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise CheckpointError(f"{folder} cannot be written ({error.strerror}): make room") from error
        raise


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder before anything is renamed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(f"{folder} has {free:,} bytes free, the weights take {size:,}: make room")
