"""Where records come from: the types that everything downstream shares, and the packaged pictures."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from absl import logging
from jaxtyping import UInt8

PICTURES = Path(__file__).parent / "pictures" / "1.0.0"
SPLITS = ("train", "validation", "test_seen", "test_unseen")
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
NO_LABEL = ("unsorted", "special", "miscellaneous")  # folders that say nothing about what is in them
MOST_NEGATIVES = 8  # wrong targets that are read of a record, however long its list is
SIDED = ("left", "right", "clockwise")


class RecordError(ValueError):
    """A record that cannot be read; the message names it. Another record can take its place."""


class SourceError(ValueError):
    """A data set that cannot be opened: nothing in it can be used before the cause is removed."""


def utf8_text(value: Any, what: str) -> str:
    """``value`` itself, where a tokenizer can read it; an error calls it ``what``.

    Raises:
        RecordError: it is no text, or holds half of a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    if not isinstance(value, str):
        raise RecordError(f"{what} is a {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} is no UTF-8 ({error.reason} at character {error.start}): encode it again") from error
    return value


@dataclass(frozen=True)
class Image:
    """An encoded picture that is decoded only when asked.

    `width` and `height` (pixels) are known without decoding; `name` serves error messages; `mirrored` flips it
    left-right after decoding.
    """

    data: bytes
    width: int
    height: int
    name: str
    mirrored: bool = False


@dataclass(frozen=True, eq=False)
class Video:
    """A decoded video: frames, uint8 [F, H, W, 3], of which `fps` make a second; `name` serves error messages."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    name: str


@dataclass(frozen=True)
class Content:
    """What one side of a pair shows: pictures, then videos, then text (an instruction, words, or both).

    `instruction` says what of the text is an instruction, where that is known; it shows nothing itself. It is the
    beginning of the text, or both ends of it with `{text}` in the words' place.
    """

    text: str = ""
    images: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()
    instruction: str = field(default="", compare=False)

    @property
    def words(self) -> str:
        """The text without its instruction."""
        before, _, after = self.instruction.partition("{text}")
        return self.text.removeprefix(before.strip()).removesuffix(after.strip()).strip()


@dataclass(frozen=True)
class Record:
    """One training pair, or one example to reconstruct.

    Records of equal `target_key`, or of equal `image_key` other than "", are never each other's negatives: the first
    says what the target shows, the second which pictures the query shows (two captions of one picture are both right).
    `negative_keys` say the same of `negatives` as `target_key` of the target; () leaves it to their contents.
    """

    id: str
    dataset: str
    query: Content
    target: Content
    target_key: str
    negatives: tuple[Content, ...] = ()
    image_key: str = ""
    negative_keys: tuple[str, ...] = ()

    def wrong_keys(self) -> tuple[str, ...]:
        """The key of each wrong target, to be compared with target keys."""
        return self.negative_keys or tuple(map(content_key, self.negatives))


def content_key(content: Content) -> str:
    """Equal for contents that show the same: the same pictures, or, without pictures, the same words."""
    if content.images:
        return image_key(content.images)
    return "text:" + hashlib.blake2b(content.words.encode(), digest_size=12).hexdigest()


def image_key(images: Sequence[Image]) -> str:
    """A hash over the bytes of pictures, "" for none."""
    if not images:
        return ""
    digest = hashlib.blake2b(digest_size=12)
    for image in images:
        digest.update(len(image.data).to_bytes(8, "little") + bytes([image.mirrored]) + image.data)
    return "image:" + digest.hexdigest()


@dataclass(frozen=True)
class Picture:
    """One embedded picture with its words; the columns are explained in the data card beside the shards."""

    id: str
    source: str
    style: str
    split: str
    group: str
    image: Image
    caption: str
    keywords: tuple[str, ...]
    description: str
    category: str
    code_point: str
    licence: str
    origin: str

    @property
    def is_flag(self) -> bool:
        """Whether it shows an emoji flag, which looks the same in every style."""
        return self.category.startswith("flags / ")

    @property
    def skin_tone(self) -> str:
        """ "light", "dark", ... for an emoji with a skin tone, "" for any other picture."""
        return next((SKIN_TONES[part] for part in self.code_point.split("-") if part in SKIN_TONES), "")

    @property
    def base_code_point(self) -> str:
        """The emoji's code points without its skin tones; "" for other pictures and for the bare tones."""
        return "-".join(part for part in self.code_point.split("-") if part not in SKIN_TONES)

    @property
    def label(self) -> str:
        """The class that a classifier should name: the emoji subgroup, the scenery or the folder; "" for none."""
        name = self.category.split(" / ", 1)[-1].replace("_", " ").lower()
        return "" if name in NO_LABEL else name

    @property
    def may_mirror(self) -> bool:
        """Whether its mirror image is still what its words say: no flag, no sign, nothing about left and right."""
        if self.category.startswith(("flags / ", "symbols / ", "signs_and_symbols")):
            return False
        words = " ".join((self.caption, self.description, *self.keywords)).lower()
        return not any(word in words for word in SIDED)


@dataclass(frozen=True)
class PictureSplit(Sequence[Picture]):
    """The pictures of one split, in memory; it pickles as its name, so that a worker process reads its own copy."""

    split: str
    pictures: tuple[Picture, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        return self.pictures[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return load_pictures, (self.split,)


@lru_cache(maxsize=len(SPLITS))
def load_pictures(split: str) -> Sequence[Picture]:
    """The embedded pictures of one split, in the order of the shards.

    Reads through `tensorflow_datasets` without TensorFlow. The raw records are parsed here: the feature connectors
    take 0.2 ms a record, ten times as long.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist: choose one of {', '.join(SPLITS)}")
    import tensorflow_datasets as tfds

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # array_record logs that records share chunks; build_pictures says why they do
    try:
        source = tfds.builder_from_directory(PICTURES).as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        records = source.__getitems__(range(len(source)))
    finally:
        logging.set_verbosity(verbosity)
    return PictureSplit(split, tuple(_parse(record) for record in records))


def _parse(record: bytes) -> Picture:
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(record).features.feature

    def text(name: str) -> str:
        return str(feature[name].bytes_list.value[0], "utf-8")

    image = Image(
        data=feature["image"].bytes_list.value[0],
        width=feature["width"].int64_list.value[0],
        height=feature["height"].int64_list.value[0],
        name=text("id"),
    )
    return Picture(
        id=text("id"),
        source=text("source"),
        style=text("style"),
        split=text("split"),
        group=text("group"),
        image=image,
        caption=text("caption"),
        keywords=tuple(word.decode() for word in feature["keywords"].bytes_list.value),
        description=text("description"),
        category=text("category"),
        code_point=text("code_point"),
        licence=text("licence"),
        origin=text("origin"),
    )
