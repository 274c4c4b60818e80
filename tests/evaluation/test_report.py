"""The report: one complete, balanced, escaped HTML file, with a section for everything that there is."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cocoa_jax.evaluation.charts import curve_chart, matrix_chart, nice_ticks, smooth
from cocoa_jax.evaluation.markup import element, picture_uri, render
from cocoa_jax.evaluation.report import (
    Curve,
    GalleryRow,
    Hit,
    MapPoint,
    Reconstruction,
    ReportData,
    project_2d,
    read_curve,
    write_report,
)

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SECTIONS = ("scores", "losses", "neighbours", "reconstructions", "visibility", "map")
NASTY = "<script>alert('x')</script> & \"quoted\" </style><img src=x onerror=y>"


class Page(HTMLParser):
    """Walks a page, refuses tags that do not balance, keeps what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close {self.open}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.tags if name in attributes.get("class", "").split()]

    def images(self) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def picture(colour: tuple[int, int, int], form: str = "PNG", side: int = 28) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, form)
    return file.getvalue()


def task(meta_task: str, split: str, p_at_1: float) -> dict[str, Any]:
    return {
        "meta_task": meta_task,
        "split": split,
        "queries": 1195,
        "candidates": 771,
        "p_at_1": p_at_1,
        "hit_at_10": 0.9,
        "chance": 0.0131,
        "untrained_p_at_1": 0.0277,
    }


def example(label: str = "kiwi fruit") -> ReportData:
    rng = np.random.default_rng(0)
    curves = tuple(
        Curve(stage, np.arange(1, 101), {"loss": np.exp(-np.arange(100) / 30) + 1, "mntp": rng.normal(size=100)})
        for stage in ("warmup", "bridge", "contrastive")
    )
    red, blue = picture((200, 0, 0)), picture((0, 0, 200), "WEBP")
    hits = tuple(Hit(label, red if place % 2 else None, 0.9 - place / 10, place == 1) for place in range(5))
    rows = tuple(GalleryRow(name, f"{name} {label}", blue, hits) for name in ("first", "first", "second"))
    pixels = rng.integers(0, 255, (28, 56, 3), dtype=np.uint8)
    results = {
        "tasks": {
            "caption-picture/test_seen": task("retrieval", "test_seen", 0.4216),
            "caption-picture/test_unseen": task("retrieval", "test_unseen", 0.1234),
            f"category {label}": task("vqa", "test_seen", 0.25),
        },
        "seconds": 541.7,
        "config": {"seed": 0, "name": label},
    }
    return ReportData(
        title=f"Report of {label}",
        summary=(f"It made {label}.", "Three stages.", "It was asked."),
        results=results,
        curves=curves,
        gallery=rows,
        reconstructions=(Reconstruction(label, pixels, pixels, pixels),),
        points=tuple(MapPoint(x, 0.5, red, f"{label} {x}") for x in (0.0, 0.5, 1.0)),
    )


def written(folder: Path, data: ReportData) -> str:
    write_report(folder / "report.html", data)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_is_balanced_and_has_every_section(tmp_path: Path) -> None:
    page = Page(written(tmp_path, example()))
    assert page.ids() >= set(SECTIONS)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]
    assert all(image["alt"] for image in page.images())
    assert [attributes["lang"] for tag, attributes in page.tags if tag == "html"] == ["en"]


def test_page_loads_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, example())
    page = Page(text)
    assert not any(tag in {"script", "link", "iframe", "object", "embed"} for tag, _ in page.tags)
    assert all(attributes["src"].startswith("data:image/") for _, attributes in page.tags if "src" in attributes)
    assert all(attributes["href"].startswith("#") for _, attributes in page.tags if "href" in attributes)
    assert not re.search(r"@import|url\(|https?://", text)
    assert any("default-src 'none'" in found.get("content", "") for tag, found in page.tags if tag == "meta")


@pytest.mark.parametrize("label", [NASTY, "a\x00b\x1b", "\ud800 alone", "שלום 🥝 ✓"])
def test_whatever_a_label_holds_stays_text(tmp_path: Path, label: str) -> None:
    calm, nasty = Page(written(tmp_path, example())), Page(written(tmp_path, example(label)))
    assert [tag for tag, _ in nasty.tags] == [tag for tag, _ in calm.tags]
    assert {name for _, found in nasty.tags for name in found} == {name for _, found in calm.tags for name in found}
    if label.isprintable():
        assert f"It made {label}." in nasty.text
        assert sum(image["alt"] == label for image in nasty.images()) == 6  # two hits with pictures in three rows


@given(st.lists(st.text(), max_size=4), st.text())
@settings(max_examples=60, deadline=None)
def test_text_and_attributes_survive(texts: list[str], value: str) -> None:
    children = [element("b", {"title": value}, text) if place % 2 else text for place, text in enumerate(texts)]
    page = Page(render(element("p", {"title": value}, *children)))
    assert [tag for tag, _ in page.tags] == ["p"] + ["b"] * (len(texts) // 2)
    clean = [re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text) for text in texts]
    assert "".join(page.text) == "".join(clean).replace("\r\n", "\n") or "\r" in "".join(clean)


@pytest.mark.parametrize(
    ("field", "section"),
    [("curves", "losses"), ("gallery", "neighbours"), ("reconstructions", "reconstructions"), ("points", "map")],
)
def test_an_empty_part_leaves_its_section_out(tmp_path: Path, field: str, section: str) -> None:
    page = Page(written(tmp_path, dataclasses.replace(example(), **{field: ()})))
    assert set(SECTIONS) - page.ids() == {section}
    assert f"#{section}" not in [attributes.get("href") for _, attributes in page.tags]


def test_nothing_but_a_title_is_still_a_page(tmp_path: Path) -> None:
    page = Page(written(tmp_path, ReportData("Empty", ("One.", "Two.", "Three."), {"tasks": {}})))
    assert page.ids() & set(SECTIONS) == {"visibility"}


def test_scores_are_percent_with_one_decimal_on_one_scale(tmp_path: Path) -> None:
    page = Page(written(tmp_path, example()))
    text = page.text
    assert {"42.2", "12.3", "25.0", "90.0", "1.3", "2.8", "1,195", "771"} <= set(text)
    assert text.count("caption-picture") == 2  # the badge says the split, so the name does not
    assert text.index("Retrieval") < text.index("VQA")
    # The largest score is 42.16 %, so the scale ends at 60 %: sorted by meta-task, seen before unseen.
    widths = [found["style"] for found in page.of_class("swatch") if "style" in found]
    assert widths == ["width:70.27%", "width:20.57%", "width:41.67%"]
    assert [found["style"] for found in page.of_class("chance") if "style" in found] == ["left:2.18%"] * 3
    assert [found["style"] for found in page.of_class("untrained") if "style" in found] == ["left:4.62%"] * 3
    assert "26.5" in text and "33.6" in text  # means: all three tasks; the two of them that are in distribution


def test_a_percentage_is_refused(tmp_path: Path) -> None:
    results = {"tasks": {"caption": task("retrieval", "test_seen", 42.16)}}
    with pytest.raises(ValueError, match=r"task caption: p_at_1 is 42\.16, expected a fraction"):
        write_report(tmp_path / "report.html", dataclasses.replace(example(), results=results))
    assert list(tmp_path.iterdir()) == []


def test_right_and_wrong_differ_by_more_than_colour(tmp_path: Path) -> None:
    page = Page(written(tmp_path, example()))
    assert page.text.count("✓") == 3 and page.text.count("✗") == 12
    assert "right, place 2" in page.text and "wrong, place 5" in page.text


def test_gallery_takes_tasks_in_turns(tmp_path: Path) -> None:
    page = Page(written(tmp_path, example()))
    asked = [text for text in page.text if text in {"first", "second"}]
    assert asked == ["first", "second", "first"]


def test_a_failed_write_leaves_the_old_page(tmp_path: Path) -> None:
    before = written(tmp_path, example())
    broken = dataclasses.replace(example(), points=(MapPoint(0, 0, b"not a picture", "x"),))
    with pytest.raises(ValueError, match="not PNG, JPEG, GIF or WebP"):
        write_report(tmp_path / "report.html", broken)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_a_page_that_cannot_be_placed_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(tmp_path / "report.html", example())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_reconstruction_of_wrong_type_is_named(tmp_path: Path) -> None:
    pixels = np.zeros((28, 28, 3), np.float32)
    broken = dataclasses.replace(example(), reconstructions=(Reconstruction("x", pixels, pixels, pixels),))
    with pytest.raises(ValueError, match=r"picture is float32 \[28, 28, 3\], expected uint8"):
        write_report(tmp_path / "report.html", broken)


@pytest.mark.parametrize(("form", "mime"), [("PNG", "png"), ("JPEG", "jpeg"), ("GIF", "gif"), ("WEBP", "webp")])
def test_media_type_is_sniffed(form: str, mime: str) -> None:
    assert picture_uri(picture((1, 2, 3), form)).startswith(f"data:image/{mime};base64,")


def test_a_large_picture_is_made_small() -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 800, 3), dtype=np.uint8)).save(file, "PNG")
    assert len(picture_uri(file.getvalue())) < 60_000 < len(file.getvalue())


def test_read_curve_tolerates_a_torn_line_and_a_restart(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0, "mntp": 2.0},
        {"step": 2, "loss": 2.5, "note": "text", "done": True},
        {"step": 3, "loss": 9.0},
        {"step": 3, "loss": 2.0, "mntp": 1.0},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo', encoding="utf-8")
    curve = read_curve(file, "warmup")
    assert curve.stage == "warmup" and curve.steps.tolist() == [1, 2, 3]
    assert curve.values["loss"].tolist() == [3.0, 2.5, 2.0]
    np.testing.assert_array_equal(curve.values["mntp"], [2.0, np.nan, 1.0])
    assert set(curve.values) == {"loss", "mntp"}


def test_read_curve_names_the_line_without_a_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 3}\n{"loss": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r'metrics\.jsonl:2: .* has no integer "step"'):
        read_curve(file, "warmup")


def test_read_curve_of_an_empty_file_draws_no_panel(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    curve = read_curve(tmp_path / "metrics.jsonl", "warmup")
    page = Page(written(tmp_path, dataclasses.replace(example(), curves=(curve,))))
    assert "losses" not in page.ids()


def test_a_curve_with_gaps_and_constants_is_drawn(tmp_path: Path) -> None:
    values = {"loss": np.array([3.0, np.nan, 3.0]), "rate": np.ones(3), "mae": np.array([np.nan, 1.0, np.inf])}
    text = written(tmp_path, dataclasses.replace(example(), curves=(Curve("warmup", np.arange(3), values),)))
    assert "losses" in Page(text).ids()
    assert not re.search(r'd="[^"]*(nan|inf)', text)
    assert not [tag for tag, _ in Page(text).tags if tag == "dt"]  # a constant and a single number are no lines


def test_curve_falls_down_the_page() -> None:
    steps = np.arange(1000)
    svg = curve_chart(steps, 5.0 - steps / 250, "loss")
    course = next(node for node in svg.iter("path") if node.attrib["class"] == "course").attrib["d"]
    points = [tuple(map(float, point.split())) for point in course[1:].split("L")]
    assert len(points) <= 321
    assert all(x0 < x1 and y0 < y1 for (x0, y0), (x1, y1) in itertools.pairwise(points))


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e4), st.integers(2, 6))
def test_ticks_are_inside_and_few(low: float, span: float, count: int) -> None:
    ticks = nice_ticks(low, low + span, count)
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    assert 1 <= len(ticks) <= count + 2


@given(st.integers(1, 400), st.floats(-10, 10))
def test_smoothing_keeps_a_constant(count: int, value: float) -> None:
    np.testing.assert_allclose(smooth(np.full(count, value)), value, atol=1e-9)


def test_visibility_shows_the_bridge_and_no_other_way(tmp_path: Path) -> None:
    mask = np.zeros((3, 3), bool)
    mask[0, 1] = True
    cells = [node for node in matrix_chart(mask, ["a", "eos", "b"], "x").iter("rect") if "cell" in node.attrib["class"]]
    assert [node.attrib["class"] for node in cells] == ["cell", "cell eos"] + ["cell"] * 7
    page = Page(written(tmp_path, example()))
    seen = [found["class"] for found in page.of_class("cell")]
    assert len(seen) == 3 * 13 * 13
    packed, paper, strict = np.array(seen).reshape(3, 13, 13) != "cell"
    assert packed[:6, :6].all() and packed[6:12, 6:12].all() and packed.sum() == 72
    assert paper[6:11, :5].sum() == 0 and paper[:5, 6:].sum() == 0 and paper[6:11, 5:11].all()
    assert (paper != strict).sum() == 5 and paper[5, 6:11].all() and not strict[5, 6:11].any()


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_places_lie_in_the_square_and_apart(count: int, width: int, seed: int) -> None:
    places = project_2d(np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32))
    assert places.shape == (count, 2) and (places >= 0).all() and (places <= 1).all()
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(count) * 9
    # Of the spacing of a square grid, 1 / sqrt(n): less than half of it would hide a picture.
    assert count == 1 or distance.min() > 0.4 / np.sqrt(count)


def test_equal_embeddings_do_not_hide_each_other() -> None:
    places = project_2d(np.ones((25, 4)))
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(25) * 9
    assert distance.min() > 0.4 / 5


def test_projection_keeps_neighbours_and_is_repeatable() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(4, 16)) * 5
    owner = np.repeat(np.arange(4), 20)
    embeddings = centres[owner] + 0.1 * rng.normal(size=(80, 16))
    places = project_2d(embeddings)
    np.testing.assert_array_equal(places, project_2d(embeddings.copy()))
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(80) * 9
    assert (owner[distance.argmin(axis=1)] == owner).mean() > 0.8


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_strongest_feature_points_right(seed: int) -> None:
    embeddings = np.random.default_rng(seed).normal(size=(40, 3)) * [1, 100, 10]
    across = project_2d(embeddings)[:, 0]
    assert np.corrcoef(across, embeddings[:, 1])[0, 1] > 0.5


@pytest.mark.parametrize("bad", [np.ones(3), np.array([[1.0, np.nan]])])
def test_projection_refuses_what_it_cannot_place(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)|embedding 0 is not finite"):
        project_2d(bad)


def test_nothing_to_project() -> None:
    assert project_2d(np.zeros((0, 5))).shape == (0, 2)
