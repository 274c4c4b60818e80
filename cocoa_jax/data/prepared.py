"""Prepared data: records with pictures at the working resolution in ArrayRecord files, and what the packer must know.

A folder holds what `tensorflow_datasets` needs to open it (`dataset_info.json`, `features.json`, shards of one split
`train`), `statistics.json`, `rejected.jsonl`, and `lengths.npz`, from which rows are planned without reading a record.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32, Int64, UInt64

from cocoa_jax.data.readers.stages import Stage
from cocoa_jax.data.sources import Content, Image, Record, SourceError

SPLIT = "train"
FORMAT = 2
LENGTHS, STATISTICS, REJECTED = "lengths.npz", "statistics.json", "rejected.jsonl"


def features() -> Any:
    """The columns of a record for `tensorflow_datasets`.

    `text`, `instruction` and `pictures` (how many) have one entry a content: query, target, then wrong targets.
    `negative_keys` has one a wrong target.
    `image` holds the encoded pictures of all contents in order; `width` and `height` their sizes. The keys are those of
    the contents as they were read: a picture that was made smaller no longer tells its own.
    """
    import tensorflow_datasets as tfds

    single = {name: tfds.features.Text() for name in ("id", "dataset", "target_key", "image_key")}
    words = {name: tfds.features.Sequence(tfds.features.Text()) for name in ("text", "instruction", "negative_keys")}
    numbers = {name: tfds.features.Sequence(tfds.features.Scalar(np.int64)) for name in ("pictures", "width", "height")}
    image = tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_))
    return tfds.features.FeaturesDict({**single, **words, **numbers, "image": image})


def serialize(record: Record) -> bytes:
    """One `tf.train.Example` in the columns of `features`."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    feature = example.features.feature
    for name in ("id", "dataset", "target_key", "image_key"):
        feature[name].bytes_list.value.append(getattr(record, name).encode())
    contents = (record.query, record.target, *record.negatives)
    images = [image for content in contents for image in content.images]
    feature["negative_keys"].bytes_list.value.extend(key.encode() for key in record.wrong_keys())
    feature["text"].bytes_list.value.extend(content.text.encode() for content in contents)
    feature["instruction"].bytes_list.value.extend(content.instruction.encode() for content in contents)
    feature["pictures"].int64_list.value.extend(len(content.images) for content in contents)
    feature["image"].bytes_list.value.extend(image.data for image in images)
    feature["width"].int64_list.value.extend(image.width for image in images)
    feature["height"].int64_list.value.extend(image.height for image in images)
    data: bytes = example.SerializeToString(deterministic=True)
    return data


def parse(data: bytes) -> Record:
    """The record that `serialize` wrote."""
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(data).features.feature
    name = feature["id"].bytes_list.value[0].decode()
    sizes = zip(feature["width"].int64_list.value, feature["height"].int64_list.value, strict=True)
    images = [
        Image(bytes_, width, height, f"{name} picture {place}")
        for place, (bytes_, (width, height)) in enumerate(zip(feature["image"].bytes_list.value, sizes, strict=True))
    ]
    contents, first = [], 0
    texts, instructions = feature["text"].bytes_list.value, feature["instruction"].bytes_list.value
    for text, instruction, count in zip(texts, instructions, feature["pictures"].int64_list.value, strict=True):
        shown = tuple(images[first : first + count])
        contents.append(Content(text.decode(), shown, instruction=instruction.decode()))
        first += count
    return Record(
        id=name,
        dataset=feature["dataset"].bytes_list.value[0].decode(),
        query=contents[0],
        target=contents[1],
        target_key=feature["target_key"].bytes_list.value[0].decode(),
        negatives=tuple(contents[2:]),
        image_key=feature["image_key"].bytes_list.value[0].decode(),
        negative_keys=tuple(key.decode() for key in feature["negative_keys"].bytes_list.value),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """What rows are planned from: of each example its tokens, patches, first token that may be hidden, and how many.

    Args:
        warmup, bridge: of each of n records; -1 where the stage has no use for it.
        contrastive: of query and target.
        negatives: of the wrong targets of all records in order.
        negative_count: how many each record has.
        keys: a hash of `target_key` and of `image_key`; 0 for none.
        negative_keys: of the wrong targets, in the manner of `target_key`.
    """

    warmup: Int32[np.ndarray, "n 4"]
    bridge: Int32[np.ndarray, "n 4"]
    contrastive: Int32[np.ndarray, "n 2 4"]
    negatives: Int32[np.ndarray, "m 4"]
    negative_count: Int32[np.ndarray, " n"]
    keys: UInt64[np.ndarray, "n 2"]
    negative_keys: UInt64[np.ndarray, " m"]

    @classmethod
    def joined(cls, parts: Sequence[Lengths]) -> Lengths:
        """Those of several parts, one after the other."""
        stored = [part.arrays() for part in parts]
        return cls(**{name: np.concatenate([part[name] for part in stored]) for name in stored[0]})

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, as they are stored."""
        return {field.name: vars(self)[field.name] for field in dataclasses.fields(self)}

    @functools.cached_property
    def first_negative(self) -> Int64[np.ndarray, " n"]:
        """Where the wrong targets of each record begin."""
        return np.concatenate([[0], np.cumsum(self.negative_count)[:-1]]).astype(np.int64)

    def examples(self, index: int, stage: Stage, negatives: int) -> Int32[np.ndarray, "x 4"]:
        """The examples that a record gives a stage; of wrong targets as many as are asked for, or as it has."""
        if stage == "warmup":
            return self.warmup[index, None]
        if stage == "bridge":
            return self.bridge[index, None]
        first = self.first_negative[index]
        end = first + min(negatives, self.negative_count[index])
        return np.concatenate([self.contrastive[index], self.negatives[first:end]])


def raw_records(folder: str, split: str) -> Any:
    """The serialized records of a folder that `tensorflow_datasets` prepared, by index."""
    import tensorflow_datasets as tfds

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # array_record logs the group sizes of other people's files
    try:
        method = tfds.decode.DeserializeMethod.RAW_BYTES
        return tfds.builder_from_directory(folder).as_data_source(split=split, deserialize_method=method)
    finally:
        logging.set_verbosity(verbosity)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedSource:
    """The records of a prepared folder: a `RecordSource`. It pickles as its folder; every process reads alone."""

    name: str
    folder: str
    statistics: Mapping[str, Any]

    def __len__(self) -> int:
        return int(self.statistics["records"])

    def record(self, index: int, rng: np.random.Generator | None = None) -> Record:
        """The record at `index`; nothing about it is random."""
        return parse(self._shards.__getitems__([index])[0])

    @property
    def made_for(self) -> str:
        """The stage for which the records are made already, "" for pairs."""
        return str(self.statistics["made_for"])

    def fingerprint(self) -> str:
        """Over the bytes of all records."""
        return str(self.statistics["fingerprint"])

    @functools.cached_property
    def lengths(self) -> Lengths:
        """What rows are planned from."""
        with (epath.Path(self.folder) / LENGTHS).open("rb") as file, np.load(file) as arrays:
            return Lengths(**arrays)

    @functools.cached_property
    def _shards(self) -> Any:
        return raw_records(self.folder, SPLIT)

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedSource, (self.name, self.folder, dict(self.statistics))


def open_prepared(folder: str, name: str = "") -> PreparedSource:
    """The source in a folder that `cocoa data build` made, local or `gs://`.

    Raises:
        SourceError: there is none, it was not finished, or another version of this made it.
    """
    path = epath.Path(folder)
    try:
        statistics = json.loads((path / STATISTICS).read_text())
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as error:  # a network that fails passes
        raise SourceError(
            f"{folder} holds no prepared data ({type(error).__name__}): make it, or finish it, by `cocoa data build`"
        ) from error
    if statistics["format"] != FORMAT:
        raise SourceError(
            f"{folder} has format {statistics['format']}, this reads {FORMAT}: remove it, or give another output, and "
            "build it again by `cocoa data build`"
        )
    return PreparedSource(name or statistics["name"], str(path), statistics)
