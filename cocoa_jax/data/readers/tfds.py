"""Image-caption and classification data sets that TensorFlow Datasets prepared as ArrayRecord, without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from cocoa_jax.data.pixels import ImageError, open_image
from cocoa_jax.data.prepared import raw_records
from cocoa_jax.data.readers.records import instructed
from cocoa_jax.data.sources import Content, Record, RecordError, SourceError, content_key, image_key

WORDS = ("caption", "captions/text", "captions", "text", "description", "label")
"""Columns that may hold a picture's words or class, the first that is there; pictures are in any one image column."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TfdsSource:
    """Picture -> caption or name of the class: a `RecordSource`. It pickles as its folder.

    Args:
        instruction: of every query; `{text}` has no use in it.
        image, words: columns; `labels` are the names of the classes where `words` holds their numbers.
    """

    name: str
    folder: str
    split: str
    instruction: str
    image: str
    words: str
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self._shards)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """The record at `index`; of several captions one is drawn.

        Raises:
            RecordError: naming the record and what is wrong with it.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        name = f"{self.split}/{index}"
        feature = tf_example_pb2.Example.FromString(self._shards.__getitems__([index])[0]).features.feature
        try:
            images = tuple(open_image(data, name) for data in feature[self.image].bytes_list.value)
            if self.labels:
                words = [self.labels[number] for number in feature[self.words].int64_list.value if number >= 0]
            else:
                words = [text.decode().strip() for text in feature[self.words].bytes_list.value]
        except (ImageError, UnicodeDecodeError, IndexError) as error:
            raise RecordError(f"{self.name} {name}: {error}") from error
        words = [text for text in words if text]
        if not images or not words:
            raise RecordError(f"{self.name} {name}: {len(images)} pictures and {len(words)} texts: leave it out")
        target = Content(words[int(rng.integers(len(words)))])
        query = instructed(self.instruction, "", images)
        return Record(name, self.name, query, target, content_key(target), image_key=image_key(images))

    def fingerprint(self) -> str:
        """Over the metadata, the sizes of the shards and the instruction."""
        folder = epath.Path(self.folder)
        digest = hashlib.blake2b((folder / "dataset_info.json").read_bytes(), digest_size=16)
        for path in sorted(folder.glob(f"*-{self.split}.array_record*")):
            digest.update(f"{path.name} {path.stat().length}\n".encode())
        digest.update(self.instruction.encode())
        return digest.hexdigest()

    @functools.cached_property
    def _shards(self) -> Any:
        return raw_records(self.folder, self.split)

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def open_tfds(folder: str, name: str, split: str = "train", instruction: str = "") -> TfdsSource:
    """The pairs of a prepared data set, in the folder that holds its `dataset_info.json`.

    Raises:
        SourceError: no such data set, another file format, no such split, or columns that hold no pairs.
    """
    path = epath.Path(folder) / "dataset_info.json"
    try:
        stored = json.loads(path.read_text()).get("fileFormat", "tfrecord")
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read ({type(error).__name__}): give the folder of a version") from error
    if stored != "array_record":
        raise SourceError(
            f"{folder} is stored as {stored!r}, only 'array_record' is read by index: prepare it again by "
            "`tfds build NAME --file_format=array_record`"
        )
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder).info
    if split not in info.splits:
        raise SourceError(f"{folder} has no split {split!r}: choose one of {', '.join(info.splits)}")
    columns = dict(_columns(info.features, ""))
    pictures = [name for name, column in columns.items() if isinstance(column, tfds.features.Image)]
    words = [name for name in WORDS if isinstance(columns.get(name), tfds.features.Text | tfds.features.ClassLabel)]
    if len(pictures) != 1 or not words:
        raise SourceError(
            f"{folder} has the columns {', '.join(sorted(columns))}: needed are one picture and one of "
            f"{', '.join(WORDS)}; bring another data set as a table"
        )
    chosen = columns[words[0]]
    labels = tuple(label.replace("_", " ") for label in chosen.names) if hasattr(chosen, "names") else ()
    return TfdsSource(name, folder, split, instruction, pictures[0], words[0], labels)


def _columns(feature: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Columns by the names under which they are stored."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        yield from _columns(feature.feature, prefix)
    elif isinstance(feature, tfds.features.FeaturesDict):
        for name, part in feature.items():
            yield from _columns(part, f"{prefix}/{name}" if prefix else name)
    else:
        yield prefix, feature
