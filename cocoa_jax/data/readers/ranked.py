"""Sets to score: queries with lists of candidates, read only when asked. MMEB, BEIR's layout, folders of classes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Int32

from cocoa_jax.data.pixels import ImageError, open_image
from cocoa_jax.data.readers.mmeb import mmeb_eval
from cocoa_jax.data.readers.records import TableSource, instructed
from cocoa_jax.data.readers.stores import PictureStore, open_store
from cocoa_jax.data.readers.tables import JsonTable, hash_file
from cocoa_jax.data.sources import Content, RecordError, SourceError, utf8_text

Split = Literal["IND", "OOD"]
Format = Literal["mmeb", "beir", "classes"]
OWN = "the sets' own file"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_Stored = tuple[str, str, str]  # text, path of a picture and instruction, as stored


@dataclass(frozen=True)
class RankedConfig:
    """One set to score.

    Args:
        format: ``mmeb``, an evaluation set as published; ``beir``, a folder of corpus.jsonl, queries.jsonl and
            qrels/NAME.tsv, in which ``image`` may name a picture, and the document with a query's id is no candidate of
            that query unless it is right; ``classes``, a folder of pictures for each class.
        path: its folder, relative to the file that names it.
        meta_task, split: under which it is counted: ``IND`` where a training set of the kind was trained on.
        subset: of MMEB, default the set's name.
        qrels: of BEIR, which judgements.
        instruction, target_instruction: before queries and candidates; MMEB brings its own.
    """

    format: Format
    path: str
    meta_task: str = "retrieval"
    split: Split = "OOD"
    subset: str = ""
    qrels: str = "test"
    instruction: str = ""
    target_instruction: str = ""


@dataclass(frozen=True)
class RankedFile:
    """Sets by name, as a YAML file lists them."""

    sets: dict[str, RankedConfig]


@dataclass(frozen=True)
class LazyContents(Sequence[Content]):
    """Contents that are made when they are asked for, by something small that is kept of each."""

    stored: Sequence[Any]
    make: Callable[[Any], Content]

    def __len__(self) -> int:
        return len(self.stored)

    @overload
    def __getitem__(self, index: int) -> Content: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Content]: ...
    def __getitem__(self, index: int | slice) -> Content | Sequence[Content]:
        if isinstance(index, slice):
            return LazyContents(self.stored[index], self.make)
        return self.make(self.stored[index])


@dataclass(frozen=True, eq=False)
class RankedSet:
    """Queries, candidates as stored, and which belong together.

    Args:
        lists: of each query, the places of its candidates; None: all of them.
        right: of each query, the places of those that are right.
        source: a hash of its settings and of what it was read from; of pictures that lie in folders, size and time.
        instruction: of its queries.
        prompts: whose instructions these are.
        left_out: of each query, the place of the one that is no candidate of it, -1 for none; None: of no query.
    """

    name: str
    meta_task: str
    split: str
    queries: Sequence[Content]
    candidates: Sequence[Content]
    lists: tuple[Int32[np.ndarray, " n"], ...] | None
    right: tuple[frozenset[int], ...]
    source: str
    instruction: str
    prompts: str
    left_out: Int32[np.ndarray, " Q"] | None = None


def open_ranked(name: str, config: RankedConfig, root: Path) -> RankedSet:
    """One set, its tables read and no picture.

    Raises:
        SourceError: naming what is not there or does not fit together.
    """
    openers = {"mmeb": _open_mmeb, "beir": _open_beir, "classes": _open_classes}
    try:
        opened = openers[config.format](name, config, root / config.path)
    except RecordError as error:  # a row of a table that cannot be read
        raise SourceError(f"{name}: {error}") from error
    if not len(opened.queries) or not len(opened.candidates):
        raise SourceError(f"{name}: {len(opened.queries)} queries, {len(opened.candidates)} candidates: both need one")
    seen = "\n".join((repr(config), opened.source))
    return replace(opened, source=hashlib.blake2b(seen.encode(), digest_size=16).hexdigest())


@dataclass
class _Numbered:
    """Distinct keys in the order of their first appearance."""

    places: dict[Any, int] = field(default_factory=dict)

    def __call__(self, key: Any) -> int:
        return self.places.setdefault(key, len(self.places))


def _open_mmeb(name: str, config: RankedConfig, root: Path) -> RankedSet:
    source = mmeb_eval(root, config.subset or name, instruction=config.instruction)
    columns, number = source.columns, _Numbered()
    queries: list[_Stored] = []
    lists = []
    for index in range(len(source.table)):
        row = source.table.row(index)
        asked, wanted = (
            str(row.get(column) or "") for column in (columns.query_instruction, columns.target_instruction)
        )
        text, path = row[columns.query_text] or "", row[columns.query_image] or ""
        texts, paths = row[columns.target_text] or [], row[columns.target_image] or []
        if not (isinstance(texts, list) and isinstance(paths, list) and _are_text(text, path, *texts, *paths)):
            raise SourceError(
                f"{name} row {index}: expected a text, a path and two lists of candidates: fetch the set again"
            )
        most = max(len(texts), len(paths))
        if not most:
            raise SourceError(f"{name} row {index}: it has no candidates, the first of which is the right one")
        listed = [
            number((texts[i] or "" if i < len(texts) else "", paths[i] or "" if i < len(paths) else "", wanted))
            for i in range(most)
        ]
        queries.append((text, path, asked))
        lists.append(np.array(listed, np.int32))
    right = tuple(frozenset([int(listed[0])]) for listed in lists)
    shown = [path for _, path, _ in (*queries, *number.places)]
    return RankedSet(
        name, config.meta_task, config.split,
        LazyContents(queries, _Side(source, "query")), LazyContents(list(number.places), _Side(source, "target")),
        tuple(lists), right, source.fingerprint() + _stamps(source.images, shown),
        source.query_instruction(queries[0][0], queries[0][2]) if queries else "",
        OWN if config.instruction else "MMEB_Test_Instruct" if columns.query_instruction else "MMEB-eval",
    )  # fmt: skip


def _are_text(*values: Any) -> bool:
    return set(map(type, values)) <= {str, type(None)}


def _stamps(store: PictureStore | None, paths: Iterable[str]) -> str:
    """Changes with the pictures that lie in folders, by their size and time: their bytes are not read."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(filter(None, set(paths))):
        stamp = store.stamp(path) if store else ""
        digest.update(f"{path}\0{stamp}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Side:
    """Stored text, path and instruction -> content, as training reads them."""

    source: TableSource
    role: Literal["query", "target"]

    def __call__(self, stored: _Stored) -> Content:
        text, path, instruction = stored
        try:
            images = self.source.read_images(path, f"{self.source.name} {path}")
            make = self.source.query_content if self.role == "query" else self.source.target_content
            made = make(text, images, instruction)
            if not made.text and not made.images:
                raise RecordError("neither text nor a picture")
            return made
        except (RecordError, ImageError) as error:
            raise SourceError(f"{self.source.name}: {self.role} {(path or text)[:80]!r}: {error}") from error


def _open_beir(name: str, config: RankedConfig, root: Path) -> RankedSet:
    corpus, asked = (_entries(name, root / f"{part}.jsonl") for part in ("corpus", "queries"))
    judged = root / "qrels" / f"{config.qrels}.tsv"
    place = {key: i for i, key in enumerate(corpus)}
    right: dict[str, set[int]] = {}
    try:
        lines = judged.read_bytes().split(b"\n")  # an id may hold what Python and Unicode take for ends of lines
    except OSError as error:
        raise SourceError(f"{name}: {judged} cannot be read ({error.strerror}): correct `path` or `qrels`") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip(b"\r") or (number == 1 and line.split(b"\t")[-1].strip() == b"score"):
            continue
        try:
            query, document, relevant = _judgement(line)
            if query not in asked or document not in place:
                what = f"query {query!r} is" if query not in asked else f"document {document!r} is"
                raise SourceError(f"{what} not in its .jsonl: correct one of them")
        except SourceError as error:
            raise SourceError(f"{judged} line {number}: {error}") from error
        if relevant:
            right.setdefault(query, set()).add(place[document])
    make = _BeirSide(name, root, config.instruction), _BeirSide(name, root, config.target_instruction)
    digest = hashlib.blake2b(digest_size=16)
    for path in (root / "corpus.jsonl", root / "queries.jsonl", judged):
        digest.update(hash_file(path).encode())
    digest.update(_stamps(open_store([root]), [path for _, path in (*corpus.values(), *asked.values())]).encode())
    own = _own_documents(right, place)
    digest.update(b"" if own is None else own.tobytes())
    return RankedSet(
        name, config.meta_task, config.split,
        LazyContents([asked[key] for key in right], make[0]), LazyContents(list(corpus.values()), make[1]),
        None, tuple(frozenset(places) for places in right.values()), digest.hexdigest(), config.instruction, OWN, own,
    )  # fmt: skip


def _own_documents(right: Mapping[str, set[int]], place: Mapping[str, int]) -> Int32[np.ndarray, " Q"] | None:
    """As BEIR leaves them out: where queries are documents (ArguAna, Quora), each would find itself first."""
    own = np.array([place.get(query, -1) for query in right], np.int32)
    own[np.array([found in places for found, places in zip(own, right.values(), strict=True)], bool)] = -1
    return own if (own >= 0).any() else None


def _judgement(line: bytes) -> tuple[str, str, bool]:
    """Query, document, and whether the score is above 0."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"no UTF-8 ({error.reason} at byte {error.start}): encode the file again") from error
    parts = text.split("\t")
    if len(parts) != 3:
        raise SourceError(f"{text[:60]!r} has {len(parts)} columns: give a query, a document and a score, by tabs")
    try:
        score = float(parts[2])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise SourceError(f"score {parts[2][:20]!r} is no number: give one above 0 for what is relevant")
    return parts[0], parts[1], score > 0


def _entries(name: str, path: Path) -> dict[str, tuple[str, str]]:
    if not path.is_file():
        raise SourceError(f"{name}: {path} is not there: correct `path`")
    table, found = JsonTable([path]), {}
    for index in range(len(table)):
        row = table.row(index)
        if "_id" not in row:
            raise SourceError(f"{path} row {index}: no `_id` among {sorted(row)}")
        key = str(row["_id"])
        if key in found:
            raise SourceError(f"{path} row {index}: `_id` {key!r} is that of an earlier row: make ids unique")
        given = [part for part in ("title", "text", "image") if row.get(part) is not None]
        try:
            values = {part: utf8_text(row[part], part) for part in given}
        except RecordError as error:
            raise SourceError(f"{path} row {index}: {error}") from error
        image = values.pop("image", "")
        found[key] = (" ".join(filter(None, values.values())), image)
    return found


@dataclass(frozen=True)
class _BeirSide:
    name: str
    root: Path
    instruction: str

    def __call__(self, stored: tuple[str, str]) -> Content:
        words, path = stored
        try:
            images = (open_image(open_store([self.root]).read(path), path),) if path else ()
        except (RecordError, ImageError) as error:
            raise SourceError(f"{self.name}: {error}") from error
        if not words and not images:
            raise SourceError(f"{self.name}: an entry has neither text nor image: leave it out")
        return instructed(self.instruction, words, images)


def _open_classes(name: str, config: RankedConfig, root: Path) -> RankedSet:
    if not root.is_dir():
        raise SourceError(f"{name}: {root} is no folder: correct `path`")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for label in classes:
        utf8_text(label, f"the name of the folder {label!r}")
    pictures = [
        (path, label)
        for label, folder in enumerate(classes)
        for path in sorted((root / folder).iterdir())
        if path.suffix.lower() in _PICTURES
    ]
    shown = [str(path.relative_to(root)) for path, _ in pictures]
    stamps = _stamps(open_store([root]), shown)
    digest = hashlib.blake2b(json.dumps([classes, shown, stamps]).encode(), digest_size=16)
    words = [(label.replace("_", " "), "") for label in classes]
    return RankedSet(
        name, config.meta_task, config.split,
        LazyContents([("", path) for path in shown], _BeirSide(name, root, config.instruction)),
        LazyContents(words, _BeirSide(name, root, config.target_instruction)),
        None, tuple(frozenset([label]) for _, label in pictures), digest.hexdigest(), config.instruction, OWN,
    )  # fmt: skip
