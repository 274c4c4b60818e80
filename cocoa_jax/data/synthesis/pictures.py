"""Which pictures and words a model is asked about."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from cocoa_jax.data.mixture import MixtureConfig, with_negatives
from cocoa_jax.data.naming import OpenedSource, open_named
from cocoa_jax.data.pixels import decode, open_image
from cocoa_jax.data.readers.stores import FolderStore
from cocoa_jax.data.sources import Content, Image, Record, SourceError

if TYPE_CHECKING:
    from cocoa_jax.data.pairs import RecordSource

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_QUALITY = 90  # of the JPEG that is sent; the picture is stored as it was


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PictureFolder:
    """The pictures below a folder as records without words: a `RecordSource`."""

    name: str
    paths: tuple[str, ...]
    store: FolderStore

    def __len__(self) -> int:
        return len(self.paths)

    def record(self, index: int, rng: np.random.Generator | None = None) -> Record:
        """The picture at ``index``.

        Raises:
            RecordError, ImageError: it cannot be read or is none.
        """
        path = self.paths[index]
        image = open_image(self.store.read(path), path)
        return Record(path, self.name, Content("", (image,)), Content(), path)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What one record shows and says."""

    record: str
    image: Image | None
    words: str

    @property
    def digest(self) -> str:
        """A hash of the picture's bytes, "" for none."""
        return hashlib.blake2b(self.image.data, digest_size=16).hexdigest() if self.image else ""

    @property
    def file_name(self) -> str:
        """A name for the picture's file that is a function of its bytes."""
        assert self.image is not None
        with PIL.Image.open(io.BytesIO(self.image.data)) as opened:
            kind = (opened.format or "picture").lower()
        return f"{self.digest}.{'jpg' if kind == 'jpeg' else kind}"


def open_subjects(names: Sequence[str], mixtures: Mapping[str, MixtureConfig]) -> list[OpenedSource]:
    """The sources of these names: those of ``cocoa data build``, and folders of pictures.

    Raises:
        SourceError: there is none of a name, or two are called the same.
    """
    opened: list[OpenedSource] = []
    for name in names:
        folder = Path(name)
        if folder.is_dir() and not (folder / "dataset_info.json").exists():
            opened.append(_open_folder(folder))
        else:
            for named in open_named(name, mixtures.get(name)):
                opened.append(dataclasses.replace(named, source=with_negatives(named.source, 0)))
    called = [source.name for source in opened]
    if len(set(called)) < len(called):
        raise SourceError(f"sources are called {sorted(called)}: name them apart in a mixture file")
    return opened


def subject(source: RecordSource, index: int) -> Subject:
    """The first picture of a record, its query's before its target's, and its words.

    Raises:
        RecordError, ImageError: it cannot be read.
    """
    record = source.record(index, np.random.default_rng(index))
    images = record.query.images + record.target.images
    words = " ".join(dict.fromkeys(part for part in (record.query.words, record.target.words) if part))
    image = dataclasses.replace(images[0], mirrored=False) if images else None
    return Subject(record.id, image, words)


def sent_jpeg(image: Image, max_pixels: int) -> bytes:
    """A picture as it is sent: upright, on white, of at most so many pixels.

    Raises:
        ImageError: it cannot be decoded.
    """
    picture = decode(image)
    size = sent_size(image.width, image.height, max_pixels)
    if size != picture.size:
        picture = picture.resize(size, PIL.Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def sent_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Width and height after shrinking."""
    shrink = min(1.0, (max_pixels / (width * height)) ** 0.5)
    return max(1, int(width * shrink)), max(1, int(height * shrink))


def _open_folder(folder: Path) -> OpenedSource:
    paths = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not paths:
        raise SourceError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}) and no dataset_info.json: name another")
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path}\0{(folder / path).stat().st_size}\n".encode("utf-8", "surrogateescape"))
    name = folder.resolve().name
    return OpenedSource(name, PictureFolder(name, tuple(paths), FolderStore(folder)), digest.hexdigest())
