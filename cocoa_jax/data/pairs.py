"""Training records made from the embedded pictures: what the three stages reconstruct and which pairs they compare."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol
from zlib import crc32

import numpy as np

from cocoa_jax.data import prompts
from cocoa_jax.data.collage import draw_collage, draw_tile, encode
from cocoa_jax.data.prompts import INSTRUCTIONS, instruct, plain
from cocoa_jax.data.sources import Content, Image, Picture, Record

COMMON_DESCRIPTION = 3  # a description of more pictures than this is boilerplate, not a description
Entry = tuple[int, ...]  # indices of the pictures of one record


class RecordSource(Protocol):
    """Records by index; what is random about them is drawn from the generator that the caller passes."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def record(self, index: int, rng: np.random.Generator) -> Record: ...


@dataclass(frozen=True)
class PictureSource:
    """The records of one kind: `entries` says which pictures make each of them, the kind's maker how."""

    name: str
    pictures: Sequence[Picture]
    entries: tuple[Entry, ...]
    things: tuple[str, ...]  # per picture: equal for pictures that show the same thing
    boilerplate: frozenset[str]
    mirror: bool

    def __len__(self) -> int:
        return len(self.entries)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """The record at `index`: a function of the index and of the generator's state only."""
        query, target, key = KINDS[self.name].make(self, self.entries[index], rng)
        return Record(
            "/".join((self.name, *(self.pictures[i].id for i in self.entries[index]))), self.name, query, target, key
        )

    def images(self, indices: Entry, rng: np.random.Generator) -> tuple[Image, ...]:
        """The pictures, all of them mirrored or none."""
        pictures = [self.pictures[i] for i in indices]
        flip = self.mirror and all(picture.may_mirror for picture in pictures) and rng.random() < 0.5
        return tuple(replace(picture.image, mirrored=True) if flip else picture.image for picture in pictures)

    def words(self, index: int, templates: Sequence[tuple[float, str]], rng: np.random.Generator) -> str:
        """Words for a picture by a random template."""
        return prompts.fill(templates, self._fields(index), usable_keywords(self.pictures[index]), rng)

    def all_words(self, index: int, rng: np.random.Generator) -> str:
        """All words for a picture, as far as they fit."""
        return prompts.fill_all(self._fields(index), usable_keywords(self.pictures[index]), rng)

    def _fields(self, index: int) -> dict[str, str]:
        picture = self.pictures[index]
        return {
            "caption": plain(picture.caption),
            "style": picture.style,
            "label": picture.label,
            "description": "" if _idle(picture, self.boilerplate) else plain(picture.description),
        }


def picture_source(kind: str, pictures: Sequence[Picture], mirror: bool = False) -> RecordSource:
    """Every record of one kind that can be made of these pictures and of no other.

    Args:
        kind: one of KINDS.
        pictures: all that may appear in a record (a caller passes the train split).
        mirror: flip half of the pictures left-right, never those whose words would become wrong (flags, signs, "left").

    Raises:
        ValueError: the kind is unknown, or the pictures hold no record of it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} does not exist: choose one of {', '.join(KINDS)}")
    entries = tuple(KINDS[kind].find(pictures))
    if not entries:
        raise ValueError(
            f"kind {kind!r} finds no record in {len(pictures)} pictures: pass more of them or leave the kind out"
        )
    uses = Counter(picture.description for picture in pictures)
    boilerplate = frozenset(text for text, count in uses.items() if count > COMMON_DESCRIPTION)
    return PictureSource(kind, pictures, entries, thing_keys(pictures), boilerplate, mirror)


def thing_keys(pictures: Sequence[Picture]) -> tuple[str, ...]:
    """One key a picture, equal for pictures joined by a chain of equal groups, equal bytes or equal captions."""
    parent = list(range(len(pictures)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str | bytes], int] = {}
    for index, picture in enumerate(pictures):
        for mark in (("group", picture.group), ("bytes", picture.image.data), ("caption", plain(picture.caption))):
            parent[root(index)] = root(first.setdefault(mark, index))
    return tuple(f"thing:{pictures[root(index)].id}" for index in range(len(pictures)))


def some_things(pictures: Sequence[Picture], share: float) -> list[Picture]:
    """About this share of the things that pictures show, all pictures of each; a smaller share lies in a larger."""
    keys = thing_keys(pictures)
    return [picture for picture, key in zip(pictures, keys, strict=True) if crc32(key.encode()) < share * 2**32]


def usable_keywords(picture: Picture) -> tuple[str, ...]:
    """The keywords that are words (they hold a letter), each once, without the caption itself."""
    words = dict.fromkeys(plain(word) for word in picture.keywords)
    return tuple(word for word in words if word != plain(picture.caption) and any(map(str.isalpha, word)))


def _idle(picture: Picture, boilerplate: frozenset[str]) -> bool:
    text = picture.description
    return text in boilerplate or "http" in text or plain(text).strip(".") == plain(picture.caption).strip(".")


def find_style_pairs(pictures: Sequence[Picture], style: str, other: str) -> list[Entry]:
    """(index in `style`, index in `other`) of one emoji in two styles; no flags, which look the same in both."""
    there = {p.code_point: i for i, p in enumerate(pictures) if p.style == other and p.code_point and not p.is_flag}
    return [(i, there[p.code_point]) for i, p in enumerate(pictures) if p.style == style and p.code_point in there]


def find_tone_pairs(pictures: Sequence[Picture]) -> list[Entry]:
    """(from, to) of one emoji in two skin tones, `from` also without; not where the tone changes nothing."""
    bases = defaultdict(list)
    for index, picture in enumerate(pictures):
        if picture.base_code_point and picture.style == "flat emoji":
            bases[picture.base_code_point].append(index)
    pairs = [(a, b) for members in bases.values() for a in members for b in members if pictures[b].skin_tone]
    return [
        (a, b)
        for a, b in pairs
        if pictures[a].skin_tone != pictures[b].skin_tone and pictures[a].image.data != pictures[b].image.data
    ]


def tone_key(picture: Picture) -> str:
    """What a skin-tone answer must match: the group and the tone."""
    return f"{picture.group}/{picture.skin_tone}"


def _all(pictures: Sequence[Picture]) -> list[Entry]:
    return [(index,) for index in range(len(pictures))]


def _other_style(pictures: Sequence[Picture]) -> list[Entry]:
    """An emoji in one style and in the other, both ways: block B from the other picture's words."""
    pairs = find_style_pairs(pictures, "flat emoji", "3d emoji")
    return [*pairs, *((b, a) for a, b in pairs)]


def _where(wanted: Callable[[Picture], bool]) -> Callable[[Sequence[Picture]], list[Entry]]:
    return lambda pictures: [(index,) for index, picture in enumerate(pictures) if wanted(picture)]


def _asked(task: str, words: str = "") -> Content:
    """Words in the instruction of a task, which is told apart from them: stages 1 and 2 rebuild none."""
    return Content(instruct(task, words), instruction=INSTRUCTIONS[task])


def _often_asked(rng: np.random.Generator, task: str, words: str = "") -> Content:
    return _asked(task, words) if rng.random() < prompts.INSTRUCTION_RATE else Content(words)


Made = tuple[Content, Content, str]


def _warmup(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    words = source.words(entry[0], prompts.RECONSTRUCTION_TEMPLATES, rng)
    return Content(words, source.images(entry, rng)), Content(), source.things[entry[0]]


def _warmup_long(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    words = source.all_words(entry[0], rng)
    return Content(words, source.images(entry, rng)), Content(), source.things[entry[0]]


def _bridge(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    """The last picture's words behind the first, which is the same one unless two of a pair are given."""
    words = source.words(entry[-1], prompts.RECONSTRUCTION_TEMPLATES, rng)
    return Content(_bridge_prompt(rng), source.images(entry[:1], rng)), Content(words), source.things[entry[0]]


def _bridge_long(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    words = source.all_words(entry[0], rng)
    return Content(_bridge_prompt(rng), source.images(entry, rng)), Content(words), source.things[entry[0]]


def _bridge_picture(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    """The last picture behind the first, which is the same one unless two of a pair are given."""
    shown, rebuilt = source.images((entry[0], entry[-1]), rng)
    return Content(_bridge_prompt(rng), (shown,)), Content(images=(rebuilt,)), source.things[entry[0]]


def _bridge_words(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    """The picture behind its words."""
    words = source.words(entry[0], prompts.RECONSTRUCTION_TEMPLATES, rng)
    return Content(words), Content(images=source.images(entry, rng)), source.things[entry[0]]


def _bridge_prompt(rng: np.random.Generator) -> str:
    return prompts.BRIDGE_PROMPTS[rng.integers(len(prompts.BRIDGE_PROMPTS))]


def _caption(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    words = source.words(entry[0], prompts.QUERY_TEMPLATES, rng)
    query = _often_asked(rng, "caption", words)
    target = replace(_often_asked(rng, "picture"), images=source.images(entry, rng))
    return query, target, source.things[entry[0]]


def _picture_caption(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    query = replace(_often_asked(rng, "picture-caption"), images=source.images(entry, rng))
    return query, Content(plain(source.pictures[entry[0]].caption)), source.things[entry[0]]


def _style(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    shown, other = source.images(entry, rng)
    target = replace(_often_asked(rng, "picture"), images=(other,))
    return replace(_asked(source.name), images=(shown,)), target, source.things[entry[1]]


def _skin_tone(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    shown, other = source.images(entry, rng)
    wanted = source.pictures[entry[1]]
    query = replace(_asked("skin-tone", prompts.TONE_TEXT.format(tone=wanted.skin_tone)), images=(shown,))
    return query, replace(_often_asked(rng, "picture"), images=(other,)), f"tone:{tone_key(wanted)}"


def _keyword(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    words = usable_keywords(source.pictures[entry[0]])
    word = words[rng.integers(len(words))]
    return replace(_asked("keyword"), images=source.images(entry, rng)), Content(word), f"text:{word}"


def _category(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    picture = source.pictures[entry[0]]
    task = "scenery" if picture.style == "photo" else "category"
    query = replace(_asked(task), images=source.images(entry, rng))
    return query, Content(picture.label), f"text:{picture.label}"


def _tile(source: PictureSource, entry: Entry, rng: np.random.Generator) -> Made:
    chosen = [entry[0]]
    while len(chosen) < 4:  # other things, so that the words name one tile only
        other = source.entries[rng.integers(len(source.entries))][0]
        if source.things[other] not in {source.things[i] for i in chosen}:
            chosen.append(other)
    tiles = [draw_tile(source.images((i,), rng)[0]) for i in chosen]
    order = rng.permutation(4)
    picture = source.pictures[entry[0]]
    collage = encode(draw_collage([tiles[i] for i in order]), f"collage of {picture.id}", "BMP")
    query = replace(_asked("tile", plain(picture.caption)), images=(collage,))
    target = replace(_asked("tile-target"), images=(encode(tiles[0], f"tile of {picture.id}", "BMP"),))
    return query, target, source.things[entry[0]]


def _find_tiles(pictures: Sequence[Picture]) -> list[Entry]:
    found: list[Entry] = [(index,) for index, picture in enumerate(pictures) if picture.style != "photo"]
    keys = thing_keys(pictures)
    return found if len({keys[index] for (index,) in found}) >= 4 else []  # a collage shows four things


@dataclass(frozen=True)
class Kind:
    """One kind of record: which pictures make one, how, and for which stage it is made already; "" for pairs."""

    find: Callable[[Sequence[Picture]], list[Entry]]
    make: Callable[[PictureSource, Entry, np.random.Generator], Made]
    made_for: Literal["", "warmup", "bridge"] = ""


KINDS: dict[str, Kind] = {
    "warmup": Kind(_all, _warmup, "warmup"),
    "warmup-long": Kind(_all, _warmup_long, "warmup"),
    "bridge": Kind(_all, _bridge, "bridge"),
    "bridge-long": Kind(_all, _bridge_long, "bridge"),
    "bridge-other": Kind(_other_style, _bridge, "bridge"),
    "bridge-picture": Kind(_all, _bridge_picture, "bridge"),
    "bridge-other-picture": Kind(_other_style, _bridge_picture, "bridge"),
    "bridge-from-words": Kind(_all, _bridge_words, "bridge"),
    "caption": Kind(_all, _caption),
    "picture-caption": Kind(_all, _picture_caption),
    "flat-3d": Kind(lambda pictures: find_style_pairs(pictures, "flat emoji", "3d emoji"), _style),
    "3d-flat": Kind(lambda pictures: find_style_pairs(pictures, "3d emoji", "flat emoji"), _style),
    "skin-tone": Kind(find_tone_pairs, _skin_tone),
    "keyword": Kind(_where(lambda picture: bool(usable_keywords(picture))), _keyword),
    "category": Kind(_where(lambda picture: bool(picture.label)), _category),
    "tile": Kind(_find_tiles, _tile),
}
