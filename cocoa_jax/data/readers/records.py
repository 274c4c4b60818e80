"""Rows of a table and a store of pictures -> records."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from cocoa_jax.data.pixels import ImageError, open_image
from cocoa_jax.data.readers.stores import PictureStore
from cocoa_jax.data.readers.tables import Row, Table
from cocoa_jax.data.sources import MOST_NEGATIVES, Content, Image, Record, RecordError, content_key, image_key

Split = Callable[[str], tuple[str, str]]
"""A stored text -> (its instruction, "" if there is none or none is known; the words after it)."""


@dataclass(frozen=True)
class Columns:
    """Which column holds what; "" for nothing.

    A column of pictures holds a path, encoded bytes, an object of ``bytes`` and ``path``, or a list of these. Columns
    of negatives hold one value or a list; texts and pictures of the same place belong together.
    """

    id: str = ""
    query_text: str = ""
    query_image: str = ""
    query_instruction: str = ""
    target_text: str = ""
    target_image: str = ""
    target_instruction: str = ""
    negative_text: str = ""
    negative_image: str = ""

    def __post_init__(self) -> None:
        for side, names in (
            ("query", (self.query_text, self.query_image)),
            ("target", (self.target_text, self.target_image)),
        ):
            if not any(names):
                raise ValueError(f"columns has neither {side}_text nor {side}_image: name at least one column")

    @property
    def names(self) -> tuple[str, ...]:
        """Every column that is read, each once."""
        return tuple(dict.fromkeys(name for field in fields(self) if (name := str(self.__dict__[field.name]))))


def plain_text(text: str) -> tuple[str, str]:
    """A text without a known instruction."""
    return "", text.strip()


@dataclass(frozen=True, eq=False, repr=False)
class TableSource:
    """The records of one data set: a `RecordSource`.

    Args:
        images: where paths lead; None for a table that holds no paths.
        instruction: stands in place of every query's own instruction, "" leaves them. ``{text}`` in it is the place of
            the words, which otherwise follow it.
        split_query, split_target: what belongs to the instruction in a stored text; module-level functions.
        list_targets: the target columns hold lists of candidates, the first of which is the target and the others,
            up to ``negatives``, are wrong ones.
        negatives: of a record at most so many wrong targets are read; those beyond may be missing or broken.
    """

    name: str
    table: Table
    columns: Columns
    images: PictureStore | None = None
    instruction: str = ""
    split_query: Split = plain_text
    split_target: Split = plain_text
    list_targets: bool = False
    negatives: int = MOST_NEGATIVES

    def __len__(self) -> int:
        return len(self.table)

    def record(self, index: int, rng: np.random.Generator | None = None) -> Record:
        """The record of row ``index``; nothing about it is random.

        Raises:
            RecordError: naming the record and what is wrong with it.
        """
        name = f"row {index}"
        try:
            row = self.table.row(index)
            name = self.identity(row, index)
            if index in self.repeated:
                raise RecordError("another row before it has the same id: make ids unique")
            return self._record(name, row)
        except (RecordError, ImageError) as error:
            raise RecordError(f"{self.name} {name}: {error}") from error

    def identity(self, row: Row, index: int) -> str:
        """The record's id: its column, else its row."""
        return str(row.get(self.columns.id)) if self.columns.id else f"{index}"

    @cached_property
    def repeated(self) -> frozenset[int]:
        """Rows whose id an earlier row has; reads the column of ids once and no other, which may hold pictures."""
        if not self.columns.id:
            return frozenset()
        keys = np.zeros(len(self.table), np.uint64)
        for index, found in enumerate(self.table.column(self.columns.id)):
            value = f"unreadable row {index}" if isinstance(found, RecordError) else str(found)
            digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            keys[index] = int.from_bytes(digest, "little")
        first = np.unique(keys, return_index=True)[1]
        return frozenset(np.setdiff1d(np.arange(len(keys)), first).tolist())

    def with_negatives(self, most: int) -> TableSource:
        """The same of at most so many wrong targets, and with what is known of ids and zips already."""
        if self.negatives <= most:
            return self
        fewer = copy.copy(self)
        vars(fewer)["negatives"] = most
        return fewer

    def fingerprint(self) -> str:
        """Changes with the rows, the mapping, the instruction, and (in zips) the pictures."""
        stored = self.settled.fingerprint() if self.settled else ""
        seen = [self.name, self.table.fingerprint(), stored, repr(self.columns), self.instruction]
        return hashlib.blake2b("\n".join(seen).encode(), digest_size=16).hexdigest()

    def read_images(self, value: Any, name: str) -> tuple[Image, ...]:
        """The pictures of one cell.

        Raises:
            RecordError, ImageError: a cell of another kind, or a picture that is missing or none.
        """
        if value is None or value == "" or value == []:
            return ()
        if isinstance(value, list):
            return tuple(image for part in value for image in self.read_images(part, name))
        if isinstance(value, dict) and {"bytes", "path"} & value.keys():
            value = value.get("bytes") or value.get("path")
            return self.read_images(value, name)
        if isinstance(value, bytes):
            return (open_image(value, name),)
        if not isinstance(value, str):
            raise RecordError(f"a picture is a {type(value).__name__}, expected a path or bytes")
        if self.settled is None:
            raise RecordError(f"path {value!r} needs a folder of pictures: set `images`")
        return (open_image(self.settled.read(value), value),)

    @cached_property
    def settled(self) -> PictureStore | None:
        """``images``, where zips are known to lack which folders of the paths; the same in every process."""
        if self.images is not None:
            self.images.settle(self.paths)
        return self.images

    def paths(self) -> Iterator[str]:
        """The paths of pictures, column by column; of a column that holds pictures themselves nothing is read."""
        columns = self.columns
        for name in filter(None, (columns.query_image, columns.target_image, columns.negative_image)):
            for cell in self.table.column(name):
                values = cell if isinstance(cell, list) else [cell]
                values = [
                    value.get("bytes") or value.get("path") if isinstance(value, dict) else value for value in values
                ]
                if any(isinstance(value, bytes) for value in values):
                    break
                yield from (value for value in values if isinstance(value, str) and value)

    def query_content(self, text: str, images: tuple[Image, ...], instruction: str = "") -> Content:
        """A query of these words, with its own instruction or the one that replaces it."""
        words = self.split_query(text)[1]
        chosen = self.query_instruction(text, instruction)
        return instructed(chosen, words, images) if words or images else Content()

    def query_instruction(self, text: str, instruction: str = "") -> str:
        """What a query of this stored text begins with."""
        return self.instruction or " ".join(filter(None, self.split_query(instruction))) or self.split_query(text)[0]

    def target_content(self, text: str, images: tuple[Image, ...], instruction: str = "") -> Content:
        """A target, or a wrong one."""
        known, words = self.split_target(text)
        chosen = " ".join(filter(None, self.split_target(instruction))) or known
        return instructed(chosen, words, images) if words or images else Content()

    def _record(self, name: str, row: Row) -> Record:
        columns = self.columns
        asked = _text(row, columns.query_instruction)
        shown = self.read_images(_cell(row, columns.query_image), f"{self.name} {name}")
        query = self.query_content(_text(row, columns.query_text), shown, asked)
        texts, pictures = _cell(row, columns.target_text), _cell(row, columns.target_image)
        wrong_texts, wrong_pictures = _cell(row, columns.negative_text), _cell(row, columns.negative_image)
        if self.list_targets:
            texts, wrong_texts = _first_and_rest(texts)
            pictures, wrong_pictures = _first_and_rest(pictures)
        asked = _text(row, columns.target_instruction)
        target = self.target_content(
            _as_text(texts, "target"), self.read_images(pictures, f"{self.name} {name}"), asked
        )
        for side, content in (("query", query), ("target", target)):
            if not content.text and not content.images:
                raise RecordError(f"its {side} has neither text nor pictures in columns {sorted(row)}: leave it out")
        wrong = (
            self.target_content(_as_text(text, "negative"), self.read_images(picture, f"{self.name} {name}"), asked)
            for text, picture in (_paired(wrong_texts, wrong_pictures) if self.negatives else [])
        )
        return Record(
            id=name,
            dataset=self.name,
            query=query,
            target=target,
            target_key=content_key(target),
            # One by one: blank ones take no places, and those beyond the last one asked for may be broken.
            negatives=tuple(islice((content for content in wrong if content.text or content.images), self.negatives)),
            image_key=image_key(query.images),
        )


def instructed(instruction: str, words: str, images: tuple[Image, ...]) -> Content:
    """Words after their instruction, or in the place that it keeps for them as ``{text}``."""
    if not instruction:
        return Content(words, images)
    if "{text}" in instruction:
        before, after = instruction.split("{text}", 1)
        return Content(f"{before}{words}{after}".strip(), images, instruction=instruction)
    return Content(f"{instruction} {words}".strip(), images, instruction=instruction)


def _cell(row: Row, column: str) -> Any:
    return row.get(column) if column else None  # objects of JSON leave out what they do not have


def _text(row: Row, column: str) -> str:
    return _as_text(_cell(row, column), column)


def _as_text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(f"{what} is a {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        raise RecordError(f"{what} is no UTF-8 ({error.reason} at character {error.start}): encode it again") from error
    return value.strip()


def _first_and_rest(value: Any) -> tuple[Any, list[Any]]:
    if value is None or value == "":
        return None, []
    if not isinstance(value, list):
        raise RecordError(f"candidates are a {type(value).__name__}, expected a list")
    return (value[0], value[1:]) if value else (None, [])


def _paired(texts: Any, pictures: Any) -> list[tuple[Any, Any]]:
    """Texts and pictures of the same place; what is there once stands alone, empty places are dropped."""
    left, right = (part if isinstance(part, list) else [part] for part in (texts, pictures))
    longest = max(len(left), len(right))
    for what, part in (("texts", left), ("pictures", right)):
        if len(part) not in (0, 1, longest):
            raise RecordError(f"{len(part)} {what} of negatives or candidates beside {longest}: make them as many")
    pairs = [(left[i] if i < len(left) else None, right[i] if i < len(right) else None) for i in range(longest)]
    return [pair for pair in pairs if any(part not in (None, "", []) for part in pair)]


def nearest(names: Sequence[str], wanted: str) -> str:
    """A hint for a misspelled name: those that hold the same letters."""
    letters = "".join(filter(str.isalnum, wanted)).lower()
    found = [name for name in names if "".join(filter(str.isalnum, name)).lower() == letters]
    return f" (did you mean {found[0]!r}?)" if found else ""
