"""The kinds of training records: which pictures they use, what they say, what is never a negative of what."""

import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_jax.data import prompts
from cocoa_jax.data.collage import TILE
from cocoa_jax.data.pairs import (
    KINDS,
    RecordSource,
    find_tone_pairs,
    picture_source,
    some_things,
    thing_keys,
    usable_keywords,
)
from cocoa_jax.data.pixels import decode
from cocoa_jax.data.readers.stages import for_stage
from cocoa_jax.data.sources import Image, Picture, Record, RecordError, load_pictures

TRAIN = load_pictures("train")
BY_ID = {picture.id: picture for picture in TRAIN}
THING = dict(zip(BY_ID, thing_keys(TRAIN), strict=True))
SOURCES: dict[str, RecordSource] = {kind: picture_source(kind, TRAIN, mirror=True) for kind in KINDS}
COUNTS = {
    "warmup": 6466, "warmup-long": 6466, "bridge": 6466, "bridge-long": 6466, "bridge-other": 2320,
    "bridge-picture": 6466, "bridge-other-picture": 2320, "bridge-from-words": 6466,
    "caption": 6466, "picture-caption": 6466,
    "flat-3d": 1160, "3d-flat": 1160, "skin-tone": 1076, "keyword": 6036, "category": 6312, "tile": 6321,
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def some(kind: str, count: int = 120) -> list[Record]:
    source, rng = SOURCES[kind], np.random.default_rng(7)
    return [source.record(int(rng.integers(len(source))), rng) for _ in range(count)]


def shown(records: Sequence[Record]) -> list[Image]:
    return [image for record in records for side in (record.query, record.target) for image in side.images]


def test_counts() -> None:
    assert {kind: len(source) for kind, source in SOURCES.items()} == COUNTS


@kinds
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_record_is_a_function_of_index_and_generator(kind: str, data: st.DataObject) -> None:
    source = SOURCES[kind]
    index = data.draw(st.integers(0, len(source) - 1))
    seed = data.draw(st.integers(0, 2**32))
    twin = pickle.loads(pickle.dumps(source))
    assert source.record(index, np.random.default_rng(seed)) == twin.record(index, np.random.default_rng(seed))


@kinds
def test_only_the_pictures_given_are_used(kind: str) -> None:
    part = [picture for picture in TRAIN if hash_of(picture.group) % 4 == 0]
    allowed = {picture.image.data for picture in part}
    ids = {picture.id for picture in part}
    source = picture_source(kind, part)
    rng = np.random.default_rng(0)
    records = [source.record(index, rng) for index in range(0, len(source), max(1, len(source) // 40))]
    if kind == "tile":
        assert all(image.name.split(" of ")[1] in ids for image in shown(records))
    else:
        assert all(image.data in allowed for image in shown(records))


def hash_of(text: str) -> int:
    return sum(text.encode())


@kinds
def test_a_source_without_records_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=kind):
        picture_source(kind, [])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'video'.*warmup"):
        picture_source("video", TRAIN)


@kinds
def test_the_random_part_varies(kind: str) -> None:
    source = SOURCES[kind]
    made = {
        (record.query.text, record.target.text, tuple(image.mirrored for image in shown([record])), record.query.images)
        for record in (source.record(index, np.random.default_rng(seed)) for index in (3, 11, 12) for seed in range(20))
    }
    assert len(made) > 3  # as many as the indices if nothing were drawn


def test_reconstruction_shows_a_picture_with_its_words() -> None:
    for record in some("warmup"):
        assert record.query.text and len(record.query.images) == 1
        assert not record.target.text and not record.target.images
    for record in some("bridge"):
        assert len(record.query.images) == 1 and record.target.text and not record.target.images
        assert record.query.text in prompts.BRIDGE_PROMPTS


def test_block_b_may_be_the_other_styles_words() -> None:
    shown = {picture.image.data: picture for picture in TRAIN}
    for record in some("bridge-other"):
        (image,) = record.query.images
        style = shown[replace(image, mirrored=False).data].style
        here, there = (BY_ID[name] for name in record.id.split("/", 1)[1].split("/") if name in BY_ID)
        assert {here.style, there.style} == {"flat emoji", "3d emoji"} and style == here.style
        assert here.code_point == there.code_point and record.target.text and not record.target.images
        assert not record.target.text.startswith(f"{here.style}: ")


def test_block_b_may_be_the_picture_the_other_styles_or_that_of_the_words() -> None:
    for kind in ("bridge-picture", "bridge-other-picture"):
        for record in some(kind):
            (shown,), (rebuilt,) = record.query.images, record.target.images
            assert record.query.text in prompts.BRIDGE_PROMPTS and not record.target.text
            here, there = BY_ID[shown.name], BY_ID[rebuilt.name]
            assert shown.mirrored == rebuilt.mirrored and here.code_point == there.code_point
            assert (here.style == there.style) == (kind == "bridge-picture") == (shown == rebuilt)
    for record in some("bridge-from-words"):
        (rebuilt,) = record.target.images
        assert not record.query.images and not record.target.text and record.query.text
        picture = BY_ID[rebuilt.name]
        parts = (prompts.plain(picture.caption), *usable_keywords(picture), prompts.plain(picture.description)[:20])
        assert any(part and part in record.query.text for part in parts)


def test_long_texts_hold_all_words() -> None:
    for kind in ("warmup-long", "bridge-long"):
        whole = 0
        for record in some(kind, 300):
            picture = BY_ID[record.query.images[0].name]
            text = record.target.text if kind == "bridge-long" else record.query.text
            assert text.startswith(prompts.plain(picture.caption)[:150]) and len(text) <= prompts.LONGEST
            if len(text) < prompts.LONGEST - 40:  # longer ones are cut between words
                assert all(word in text for word in usable_keywords(picture))
                whole += 1
        assert whole > 200


@given(share=st.floats(0.01, 1), more=st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_some_things_are_whole_things_and_part_of_more(share: float, more: float) -> None:
    part = {picture.id for picture in some_things(TRAIN, share)}
    things = {THING[name] for name in part}
    assert part == {name for name, thing in THING.items() if thing in things}
    assert part <= {picture.id for picture in some_things(TRAIN, min(1.0, share + more))}
    # Things are as many as pictures nearly: five standard deviations of 3,000 draws are 0.046.
    assert abs(len(things) / len(set(THING.values())) - share) < 0.046


def test_texts_are_short_and_plain() -> None:
    for kind in ("warmup", "bridge", "caption"):
        for record in some(kind, 400):
            for text in (record.query.text, record.target.text):
                assert len(text) <= prompts.LONGEST + 60  # an instruction may stand before it
                assert "http" not in text and "_" not in text and "{" not in text


def test_words_are_made_plain_and_cut() -> None:
    assert prompts.plain("  Traffic_Sign\n 03 ") == "traffic sign 03"
    rng = np.random.default_rng(0)
    words = prompts.fill(
        [(1.0, "{caption}: {keywords}"), (1.0, "{none}")], {"caption": "a" * 190, "none": ""}, ["b c d e f"], rng
    )
    assert words == "a" * 190 + ": b c d e"


def test_caption_pairs_words_with_their_picture() -> None:
    bare = 0
    for record in some("caption", 400):
        picture = BY_ID[record.target.images[0].name]
        assert record.target_key == THING[picture.id]
        assert not record.query.images
        bare += not record.query.text.startswith(prompts.instruct("caption"))
        parts = (prompts.plain(picture.caption), *usable_keywords(picture), prompts.plain(picture.description)[:20])
        assert any(part and part in record.query.text for part in parts)
    assert 0.15 < bare / 400 < 0.35  # a quarter, give or take four standard deviations
    record = some("picture-caption", 1)[0]
    assert record.target.text == prompts.plain(BY_ID[record.query.images[0].name].caption)


@pytest.mark.parametrize(
    ("kind", "style", "other"), [("flat-3d", "flat emoji", "3d emoji"), ("3d-flat", "3d emoji", "flat emoji")]
)
def test_styles_pair_one_code_point(kind: str, style: str, other: str) -> None:
    for record in some(kind):
        query, target = (BY_ID[side.images[0].name] for side in (record.query, record.target))
        assert (query.style, target.style) == (style, other)
        assert query.code_point == target.code_point and not query.is_flag
        assert record.query.images[0].mirrored == record.target.images[0].mirrored


def test_skin_tones_of_one_base() -> None:
    keys: dict[str, set[str]] = {}
    for record in some("skin-tone", 600):
        query, target = (BY_ID[side.images[0].name] for side in (record.query, record.target))
        assert query.base_code_point == target.base_code_point
        assert query.skin_tone != target.skin_tone and target.skin_tone
        assert record.query.text.endswith(f"with {target.skin_tone} skin tone")
        keys.setdefault(target.group, set()).add(record.target_key)
    assert any(len(tones) == 2 for tones in keys.values())  # light and dark of one group are each other's negatives
    pairs = find_tone_pairs(TRAIN)
    assert all(TRAIN[a].image.data != TRAIN[b].image.data for a, b in pairs)


def test_keyword_is_another_word() -> None:
    for record in some("keyword", 400):
        picture = BY_ID[record.query.images[0].name]
        assert record.target.text != prompts.plain(picture.caption)
        assert record.target.text in {prompts.plain(word) for word in picture.keywords}
        assert record.target_key == f"text:{record.target.text}"


def test_category_is_the_label() -> None:
    for record in some("category"):
        picture = BY_ID[record.query.images[0].name]
        assert record.target.text == picture.label != ""
        scenery = prompts.instruct("scenery") == record.query.text
        assert scenery == (picture.style == "photo")
    emoji = {(picture.category, picture.label) for picture in TRAIN if picture.code_point}
    assert len(emoji) == len({label for _, label in emoji}) == 100  # no two subgroups share a name


@pytest.mark.parametrize("kind", [kind for kind, made in KINDS.items() if not made.made_for])
def test_stages_1_and_2_rebuild_the_words_of_pairs_and_no_instruction(kind: str) -> None:
    parts = [part for text in prompts.INSTRUCTIONS.values() for part in text.split("{text}") if part.strip('"')]
    instructed = words = 0
    for record in some(kind, 40):
        instructed += any(part in side.text for part in parts for side in (record.query, record.target))
        rebuilt = [for_stage(record, "warmup").query.text]
        try:
            rebuilt.append(for_stage(record, "bridge").target.text)
        except RecordError as error:
            assert "query and target have pictures" in str(error)
        assert not any(part in text for part in parts for text in rebuilt), rebuilt
        assert all(record.target.text in text for text in rebuilt if not record.target.images)
        words += all(rebuilt)
    # Pictures in two styles have no words.
    assert instructed > 0 and words == (0 if "3d" in kind else 40)


def test_tile_is_part_of_its_collage() -> None:
    corners = set()
    for record in some("tile"):
        collage, tile = (np.asarray(decode(side.images[0])) for side in (record.query, record.target))
        assert collage.shape == (2 * TILE, 2 * TILE, 3) and tile.shape == (TILE, TILE, 3)
        parts = collage.reshape(2, TILE, 2, TILE, 3).swapaxes(1, 2).reshape(4, TILE, TILE, 3)
        found = [corner for corner in range(4) if (parts[corner] == tile).all()]
        assert len(found) == 1
        corners.add(found[0])
        picture = BY_ID[record.target.images[0].name.removeprefix("tile of ")]
        assert prompts.plain(picture.caption) in record.query.text
    assert corners == {0, 1, 2, 3}


def test_mirroring_spares_flags_and_signs_and_can_be_left_out() -> None:
    images = shown(some("caption", 600))
    assert 0.3 < np.mean([image.mirrored for image in images if BY_ID[image.name].may_mirror]) < 0.7
    assert not any(image.mirrored for image in images if not BY_ID[image.name].may_mirror)
    assert not any(picture.may_mirror for picture in TRAIN if picture.is_flag or "right" in picture.caption)
    plain, rng = picture_source("caption", TRAIN), np.random.default_rng(0)
    assert not any(image.mirrored for image in shown([plain.record(index, rng) for index in range(50)]))


def test_equal_captions_bytes_and_groups_are_one_thing() -> None:
    first: dict[object, str] = {}
    for picture in TRAIN:
        for mark in (picture.group, picture.image.data, ("caption", prompts.plain(picture.caption))):
            assert first.setdefault(mark, THING[picture.id]) == THING[picture.id]
    assert len(set(THING.values())) > 3500  # and the chains did not join everything


def test_things_chain() -> None:
    a, b, c, d = (replace(TRAIN[i], group=str(i), caption=str(i)) for i in range(4))
    keys = thing_keys([a, replace(b, group="0"), replace(c, caption="1"), d])
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_instructions_have_a_stable_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = prompts.instructions_hash()
    assert before == prompts.instructions_hash() and len(before) == 12
    monkeypatch.setitem(prompts.INSTRUCTIONS, "caption", "Find {text}")
    assert prompts.instructions_hash() != before


@given(st.text(alphabet=" abc", max_size=40), st.integers(1, 20))
def test_shorten_cuts_between_words(text: str, limit: int) -> None:
    short = prompts.shorten(text, limit)
    assert len(short) <= limit and text.startswith(short)
    if len(text) <= limit:
        assert short == text
    elif " " in text[: limit + 1]:
        assert text[len(short)] == " "
    else:  # one word that is longer than all there may be
        assert short == text[:limit]


def test_no_picture_is_a_test_picture() -> None:
    assert {picture.split for picture in TRAIN} == {"train"}
    assert isinstance(TRAIN[0], Picture)
