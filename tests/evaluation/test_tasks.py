"""The evaluation tasks: unique candidates, right relevance, nothing that was trained on among the answers."""

from collections import Counter
from collections.abc import Hashable

import numpy as np
import pytest

from cocoa_jax.data.pixels import decode
from cocoa_jax.data.prompts import instruct, plain
from cocoa_jax.data.sources import Content, Image, Picture, load_pictures
from cocoa_jax.evaluation import tasks
from cocoa_jax.evaluation.tasks import SPLITS, Task, match, picture_tasks

ALL = {split: {task.name.split("/")[0]: task for task in picture_tasks(split)} for split in SPLITS}
EVERY = [task for named in ALL.values() for task in named.values()]
PICTURES = {p.id: p for split in ("train", *SPLITS) for p in load_pictures(split)}
each = pytest.mark.parametrize("task", EVERY, ids=[task.name for task in EVERY])


def shown(content: Content) -> Hashable:
    return content.text, tuple(image.data for image in content.images)


def picture(content: Content) -> Picture:
    return PICTURES[content.images[0].name]


def answers(task: Task, query: int) -> list[Content]:
    return [task.candidates[index] for index in sorted(task.relevant[query])]


def test_the_list() -> None:
    tested = [task for task in EVERY if task.split != "validation"]
    assert len(tested) >= 10 and len({task.name.split("/")[0] for task in tested}) >= 8
    assert {task.meta_task for task in tested} == {"classification", "vqa", "retrieval", "grounding"}
    sizes = {task.name: (len(task.queries), len(task.candidates)) for task in tested}
    assert sizes["caption-to-picture/test_unseen"] == (517, 771)  # 789 less 17 photos and one whose bytes are in train
    assert sizes["caption-to-picture/test_seen"] == (195, 195)
    assert sizes["scenery/test_unseen"] == (17, 17)


@each
def test_the_form_of_a_task(task: Task) -> None:
    assert task.name.endswith(f"/{task.split}")
    assert len(task.queries) == len(task.relevant) >= 15
    assert len(task.candidates) >= 4
    assert max(Counter(map(shown, task.candidates)).values()) == 1
    assert max(Counter(map(shown, task.queries)).values()) == 1
    for right in task.relevant:
        assert right and min(right) >= 0 and max(right) < len(task.candidates)
    chance = np.mean([len(right) / len(task.candidates) for right in task.relevant])
    assert chance < 0.1


@each
def test_no_answer_was_trained_on(task: Task) -> None:
    train = {p.image.data for p in load_pictures("train")}
    assert not any(image.data in train for content in task.candidates for image in content.images)
    if task.name != "flat-to-3d/test_seen":
        assert not any(image.data in train for content in task.queries for image in content.images)
        names = {name for side in (task.queries, task.candidates) for c in side for i in c.images for name in [i.name]}
        splits = {PICTURES[part].split for name in names for part in name.split(" of ")[-1].split(", ")}
        assert splits <= {task.split}


@pytest.mark.parametrize("split", SPLITS)
def test_every_picture_of_the_group_is_right(split: str) -> None:
    task = ALL[split]["caption-to-picture"]
    for query, content in enumerate(task.queries):
        groups = {picture(candidate).group for candidate in answers(task, query)}
        assert len(groups) == 1
        (group,) = groups
        members = [i for i, candidate in enumerate(task.candidates) if picture(candidate).group == group]
        assert task.relevant[query] == frozenset(members)
        captions = {plain(picture(task.candidates[i]).caption) for i in members}
        assert content.text in {instruct("caption", caption) for caption in captions}
    back = ALL[split]["picture-to-caption"]
    for query, content in enumerate(back.queries):
        assert plain(picture(content).caption) in {answer.text for answer in answers(back, query)}


def test_photos_belong_to_classification_only() -> None:
    for task in EVERY:
        images = [image for content in (*task.queries, *task.candidates) for image in content.images]
        ids = {part for image in images for part in image.name.split(" of ")[-1].split(", ")}
        if any(PICTURES[part].style == "photo" for part in ids):
            assert task.name.startswith("scenery/")


@pytest.mark.parametrize("split", SPLITS)
def test_styles(split: str) -> None:
    task = ALL[split]["flat-to-3d"]
    for query, content in enumerate(task.queries):
        flat = picture(content)
        assert flat.style == "flat emoji" and not flat.is_flag and not flat.skin_tone
        assert flat.split == ("train" if split == "test_seen" else split)
        assert flat.code_point in {picture(answer).code_point for answer in answers(task, query)}
        assert {picture(answer).group for answer in answers(task, query)} == {flat.group}
    assert {picture(candidate).style for candidate in task.candidates} == {"3d emoji"}
    assert {picture(candidate).split for candidate in task.candidates} == {split}


def test_skin_tones() -> None:
    task = ALL["test_unseen"]["skin-tone"]
    for query, content in enumerate(task.queries):
        asked = picture(content)
        for answer in map(picture, answers(task, query)):
            assert (answer.group, answer.base_code_point) == (asked.group, asked.base_code_point)
            assert content.text.endswith(f"with {answer.skin_tone} skin tone")
        tones = {picture(c).skin_tone for c in task.candidates if picture(c).base_code_point == asked.base_code_point}
        assert tones == {"", "light", "dark"}


def test_classes() -> None:
    for split in SPLITS:
        task = ALL[split]["emoji-category"]
        assert len(task.candidates) == 100
        for query, content in enumerate(task.queries):
            assert [answer.text for answer in answers(task, query)] == [picture(content).label]


def test_keywords() -> None:
    task = ALL["test_unseen"]["keyword"]
    for query, content in enumerate(task.queries):
        asked = picture(content)
        members = [p for p in load_pictures("test_unseen") if p.group == asked.group]
        known = {plain(word) for p in members for word in (*p.keywords, p.caption)}
        assert {answer.text for answer in answers(task, query)} <= known
        assert not asked.is_flag


def test_tiles() -> None:
    task = ALL["test_unseen"]["tile"]
    assert len({shown(Content(images=content.images)) for content in task.queries}) == len(task.queries) // 4
    for query in range(0, len(task.queries), 40):
        collage = np.asarray(decode(task.queries[query].images[0]))
        (answer,) = answers(task, query)
        tile = np.asarray(decode(answer.images[0]))
        places = [collage[y : y + 56, x : x + 56] for y in (0, 56) for x in (0, 56)]
        assert any((place == tile).all() for place in places)
        owner = PICTURES[answer.images[0].name.removeprefix("tile of ")]
        assert plain(owner.caption) in task.queries[query].text


def test_tasks_are_equal_in_every_run() -> None:
    assert {task.name: task for task in picture_tasks("test_seen")} == {t.name: t for t in ALL["test_seen"].values()}


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_splits_are_refused(split: str) -> None:
    with pytest.raises(ValueError, match=rf"'{split}'.*validation, test_seen, test_unseen"):
        picture_tasks(split)


def test_equal_contents_become_one() -> None:
    """Candidates of equal bytes carry the keys of both, whatever they are called; a query without an answer goes."""
    a, b, twin = (Content("", (Image(data, 1, 1, name),)) for data, name in ((b"a", "a"), (b"b", "b"), (b"a", "twin")))
    one: frozenset[Hashable] = frozenset([1])
    two: frozenset[Hashable] = frozenset([2])
    queries: tasks.Side = [(Content("one"), one), (Content("two"), two), (Content("one"), one)]
    queries.append((Content("none"), frozenset([9])))
    task = match("name", "retrieval", "validation", queries, [(a, one), (b, two), (twin, two)])
    assert task.candidates == (a, b)
    assert task.queries == (Content("one"), Content("two"))
    assert task.relevant == (frozenset([0]), frozenset([0, 1]))
    words: tasks.Side = [(Content("x"), one), (Content("y"), two)]
    both = match("name", "retrieval", "validation", [(a, one), (twin, two)], words)
    assert both.relevant == (frozenset([0, 1]),)


def test_small_tasks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FEWEST_QUERIES", 192)
    assert {task.name.split("/")[0] for task in picture_tasks("test_seen")} == {
        "caption-to-picture",
        "picture-to-caption",
        "tile",
    }
