"""Retrieval tasks of the MMEB kind over the embedded pictures: queries, candidates, and which candidates are right."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from cocoa_jax.data import prompts
from cocoa_jax.data.collage import draw_collage, draw_tile, encode
from cocoa_jax.data.pairs import find_style_pairs, find_tone_pairs, tone_key, usable_keywords
from cocoa_jax.data.prompts import instruct, plain
from cocoa_jax.data.sources import Content, Picture, load_pictures

SPLITS = ("validation", "test_seen", "test_unseen")
FEWEST_QUERIES = 15
FEWEST_CANDIDATES = 4

Side = list[tuple[Content, frozenset[Hashable]]]  # contents with the keys of what they show


@dataclass(frozen=True)
class Task:
    """Queries, candidates of distinct content, and per query the indices of the right candidates."""

    name: str
    meta_task: str
    split: str
    queries: tuple[Content, ...]
    candidates: tuple[Content, ...]
    relevant: tuple[frozenset[int], ...]


def picture_tasks(split: str) -> list[Task]:
    """Every task that the split has enough pictures for; equal in every run.

    Nothing of the split was trained on, and a picture whose very bytes are in train is left out. Two things of train
    take part: the names of the classes, and on test_seen, which is 3D only, the flat twins of its emoji as the queries
    of flat-to-3d (the flat drawing was seen in training; the 3D one, and so the pair, never was).

    Raises:
        ValueError: the split is not one of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not for evaluation: choose one of {', '.join(SPLITS)}")
    train = load_pictures("train")
    seen = {picture.image.data for picture in train}
    pictures = [picture for picture in load_pictures(split) if picture.image.data not in seen]
    tasks = []
    for name, (meta_task, make) in TASKS.items():
        queries, candidates = make(pictures, train)
        task = match(f"{name}/{split}", meta_task, split, queries, candidates)
        if len(task.queries) >= FEWEST_QUERIES and len(task.candidates) >= FEWEST_CANDIDATES:
            tasks.append(task)
    return tasks


def match(name: str, meta_task: str, split: str, queries: Side, candidates: Side) -> Task:
    """A task in which a candidate is right when it shares a key with the query.

    Equal contents become one first, with the keys of all of them: of two equal pictures no model can prefer the right
    one. Queries without a right candidate are left out.
    """
    unique_queries, unique_candidates = _unique(queries), _unique(candidates)
    holders: dict[Hashable, set[int]] = defaultdict(set)
    for index, (_, keys) in enumerate(unique_candidates):
        for key in keys:
            holders[key].add(index)
    right = [frozenset().union(*(holders.get(key, ()) for key in keys)) for _, keys in unique_queries]
    kept = [(content, indices) for (content, _), indices in zip(unique_queries, right, strict=True) if indices]
    return Task(
        name,
        meta_task,
        split,
        tuple(content for content, _ in kept),
        tuple(content for content, _ in unique_candidates),
        tuple(indices for _, indices in kept),
    )


def _unique(side: Side) -> Side:
    merged: dict[Hashable, tuple[Content, frozenset[Hashable]]] = {}
    for content, keys in side:
        shown = (content.text, tuple((image.data, image.mirrored) for image in content.images))
        first, known = merged.get(shown, (content, frozenset()))
        merged[shown] = first, known | keys
    return list(merged.values())


def _side(pairs: Iterable[tuple[Content, Hashable]]) -> Side:
    return [(content, frozenset([key])) for content, key in pairs]


def _target(picture: Picture) -> Content:
    return Content(instruct("picture"), (picture.image,))


def _ask(instruction: str, picture: Picture, text: str = "") -> Content:
    return Content(instruct(instruction, text), (picture.image,))


def _drawn(pictures: Sequence[Picture]) -> list[Picture]:
    """All but the photos, whose captions are class names."""
    return [picture for picture in pictures if picture.style != "photo"]


def _plain_emoji(pictures: Sequence[Picture]) -> list[Picture]:
    """Emoji without skin tones, so that a drawing counts once, and without flags, equal in all styles."""
    return [picture for picture in pictures if picture.code_point and not picture.skin_tone and not picture.is_flag]


def _caption_to_picture(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    queries = _side((Content(instruct("caption", plain(p.caption))), p.group) for p in _drawn(pictures))
    return queries, _side((_target(p), p.group) for p in _drawn(pictures))


def _picture_to_caption(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    queries = _side((_ask("picture-caption", p), p.group) for p in _drawn(pictures))
    return queries, _side((Content(plain(p.caption)), p.group) for p in _drawn(pictures))


def _flat_to_3d(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    emoji = _plain_emoji(pictures)
    flat = [p for p in emoji if p.style == "flat emoji"] or [p for p in _plain_emoji(train) if p.style == "flat emoji"]
    solid = [p for p in emoji if p.style == "3d emoji"]
    pairs = find_style_pairs([*flat, *solid], "flat emoji", "3d emoji")
    queries = _side((_ask("flat-3d", flat[i]), flat[i].group) for i, _ in pairs)
    return queries, _side((_target(p), p.group) for p in solid)


def _3d_to_flat(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    emoji = _plain_emoji(pictures)
    pairs = find_style_pairs(emoji, "3d emoji", "flat emoji")
    queries = _side((_ask("3d-flat", emoji[i]), emoji[i].group) for i, _ in pairs)
    return queries, _side((_target(p), p.group) for p in emoji if p.style == "flat emoji")


def _skin_tone(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    pairs = find_tone_pairs(pictures)
    shown = [pictures[i] for i in sorted({i for pair in pairs for i in pair})]
    queries = _side(
        (_ask("skin-tone", pictures[a], prompts.TONE_TEXT.format(tone=pictures[b].skin_tone)), tone_key(pictures[b]))
        for a, b in pairs
    )
    return queries, _side((_target(p), tone_key(p)) for p in shown)


def _labels(instruction: str, asked: Sequence[Picture], named: Sequence[Picture]) -> tuple[Side, Side]:
    queries = _side((_ask(instruction, p), p.label) for p in asked if p.label)
    return queries, _side((Content(label), label) for label in sorted({p.label for p in named if p.label}))


def _emoji_category(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    return _labels("category", _plain_emoji(pictures), [p for p in train if p.code_point])


def _scenery(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    return _labels("scenery", *([p for p in side if p.style == "photo"] for side in (pictures, train)))


def _clip_art_category(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    return _labels("category", *([p for p in side if p.style == "clip art"] for side in (pictures, train)))


def _keyword(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    """Right is every word for the picture's group, its captions too when they happen to be candidates."""
    asked = [p for p in _drawn(pictures) if usable_keywords(p) and not p.skin_tone and not p.is_flag]
    words: dict[str, set[str]] = defaultdict(set)
    for p in asked:
        words[p.group] |= {plain(p.caption), *map(plain, p.keywords)}
    queries: Side = [(_ask("keyword", p), frozenset(words[p.group])) for p in asked]
    return queries, _side((Content(word), word) for p in asked for word in usable_keywords(p))


def _tile(pictures: Sequence[Picture], train: Sequence[Picture]) -> tuple[Side, Side]:
    """Collages of four; each of its things is asked for once. One picture a group, so that a name means one tile."""
    by_group = {p.group: p for p in reversed(_drawn(pictures))}
    shown = [by_group[group] for group in sorted(by_group)]
    order = np.random.default_rng(crc32(b"tile")).permutation(len(shown))
    queries, candidates = [], []
    for start in range(0, len(shown) - 3, 4):
        four = [shown[i] for i in order[start : start + 4]]
        tiles = [draw_tile(p.image) for p in four]
        collage = encode(draw_collage(tiles), f"collage of {', '.join(p.id for p in four)}", "PNG")
        for picture, tile in zip(four, tiles, strict=True):
            queries.append((Content(instruct("tile", plain(picture.caption)), (collage,)), picture.group))
            crop = encode(tile, f"tile of {picture.id}", "PNG")
            candidates.append((Content(instruct("tile-target"), (crop,)), picture.group))
    return _side(queries), _side(candidates)


Maker = Callable[[Sequence[Picture], Sequence[Picture]], tuple[Side, Side]]
TASKS: dict[str, tuple[str, Maker]] = {
    "caption-to-picture": ("retrieval", _caption_to_picture),
    "picture-to-caption": ("retrieval", _picture_to_caption),
    "flat-to-3d": ("retrieval", _flat_to_3d),
    "3d-to-flat": ("retrieval", _3d_to_flat),
    "skin-tone": ("retrieval", _skin_tone),
    "emoji-category": ("classification", _emoji_category),
    "scenery": ("classification", _scenery),
    "clip-art-category": ("classification", _clip_art_category),
    "keyword": ("vqa", _keyword),
    "tile": ("grounding", _tile),
}
