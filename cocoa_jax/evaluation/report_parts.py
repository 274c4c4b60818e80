"""The parts of the report that show pictures and curves: each function gives the figures of one section."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cocoa_jax.attention import spans
from cocoa_jax.evaluation.charts import curve_chart, last_value, matrix_chart, sparkline
from cocoa_jax.evaluation.markup import Child, Element, element, encode_webp, picture_uri
from cocoa_jax.evaluation.report_data import Curve, GalleryRow, Hit, MapPoint, Reconstruction

_MAIN_VALUE = "loss"


def curves_part(curves: Sequence[Curve]) -> list[Element]:
    """One panel a stage with its loss, and small lines for whatever else was measured."""
    panels = [_stage(place, curve) for place, curve in enumerate(curves, start=1)]
    return [element("div", {"class": "panels"}, *(panel for panel in panels if panel is not None))]


def drawable(curve: Curve) -> bool:
    """Whether a curve has at least two losses to draw a line through."""
    return _MAIN_VALUE in curve.values and int(np.isfinite(curve.values[_MAIN_VALUE]).sum()) >= 2


def _stage(place: int, curve: Curve) -> Element | None:
    if not drawable(curve):
        return None
    others = [
        _measure(name, curve.steps[kept], values[kept])
        for name, values in curve.values.items()
        if name != _MAIN_VALUE and (kept := np.isfinite(values)).any() and np.ptp(values[kept]) > 0
    ]
    kept = np.isfinite(curve.values[_MAIN_VALUE])
    steps = curve.steps[kept]
    title = element(
        "figcaption", {}, element("span", {"class": "eyebrow"}, f"Stage {place}"), element("strong", {}, curve.stage)
    )
    title.append(element("span", {"class": "note"}, f"loss over {int(steps[-1]) + 1:,} steps"))
    children: list[Child] = [title, curve_chart(steps, curve.values[_MAIN_VALUE][kept], f"loss of {curve.stage}")]
    if others:
        children.append(element("dl", {"class": "measures"}, *others))
    return element("figure", {"class": f"panel stage{(place - 1) % 3 + 1}"}, *children)


def _measure(name: str, steps: np.ndarray, values: np.ndarray) -> Element:
    return element(
        "div",
        {},
        element("dt", {}, name.replace("_", " ")),
        element("dd", {}, sparkline(steps, values, name), element("span", {}, last_value(values))),
    )


def gallery_part(rows: Sequence[GalleryRow]) -> list[Element]:
    """A row a query: what was asked, then its nearest candidates; the tasks take turns."""
    by_task = [[row for row in rows if row.task == task] for task in dict.fromkeys(row.task for row in rows)]
    turns = [row for turn in itertools.zip_longest(*by_task) for row in turn if row is not None]
    return [element("div", {"class": "gallery"}, *(_gallery_row(row) for row in turns))]


def _gallery_row(row: GalleryRow) -> Element:
    ask: list[Child] = [element("span", {"class": "eyebrow"}, row.task.replace("_", " "))]
    if row.picture is not None:
        ask.append(_picture(row.picture, f"query picture: {row.query}" if row.query else "query picture"))
    if row.query:
        ask.append(element("p", {}, row.query))
    if row.note:
        ask.append(element("span", {"class": "note"}, row.note))
    texts = all(hit.picture is None for hit in row.hits)
    return element(
        "article",
        {"class": "query"},
        element("div", {"class": "ask"}, *ask),
        element(
            "ol",
            {"class": f"hits{' texts' if texts else ''}"},
            *(_hit(place, hit) for place, hit in enumerate(row.hits, start=1)),
        ),
    )


def _hit(place: int, hit: Hit) -> Element:
    word, sign = ("right", "✓") if hit.right else ("wrong", "✗")
    mark = element("b", {"class": "mark", "title": word}, element("span", {"aria-hidden": "true"}, sign))
    mark.append(element("span", {"class": "sr"}, f"{word}, place {place}"))
    shown = element("div", {"class": "words"}, hit.label) if hit.picture is None else _picture(hit.picture, hit.label)
    foot: list[Child] = [mark, element("span", {"class": "score", "title": "cosine"}, f"{hit.score:.3f}")]
    children: list[Child] = [shown, element("div", {"class": "foot"}, *foot)]
    if hit.picture is not None:
        children.append(element("div", {"class": "name", "title": hit.label, "aria-hidden": "true"}, hit.label))
    return element("li", {"class": word}, *children)


def reconstructions_part(reconstructions: Sequence[Reconstruction]) -> list[Element]:
    """A card a picture: with its hidden units, as drawn by the head, as it was."""
    return [element("div", {"class": "triples"}, *(_triple(item) for item in reconstructions))]


def _triple(item: Reconstruction) -> Element:
    steps = (("masked", item.masked), ("drawn", item.drawn), ("original", item.original))
    shown = [
        element(
            "div",
            {},
            _picture(_encode(pixels), f"{item.label}, {name}"),
            element("span", {"aria-hidden": "true"}, name),
        )
        for name, pixels in steps
    ]
    return element(
        "figure", {"class": "triple"}, element("figcaption", {}, item.label), element("div", {"class": "three"}, *shown)
    )


def _encode(pixels: np.ndarray) -> bytes:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"picture is {pixels.dtype} {list(pixels.shape)}, expected uint8 [h, w, 3]; convert it first")
    return encode_webp(Image.fromarray(pixels))


def visibility_part() -> list[Element]:
    """Who sees whom: the masks of the method as small matrices, computed by the code that trains."""
    document = spans.segments([5 + 1 + 5], 13)
    used = document.end > document.start
    bridge = spans.Spans(np.where(used, 5, 0).astype(np.int32), np.where(used, 6, 0).astype(np.int32))
    packed_kinds = ["a"] * 5 + ["eos"] + ["b"] * 5 + ["eos"] + ["pad"]
    bridged_kinds = ["a"] * 5 + ["eos"] + ["b"] * 5 + ["pad"] * 2
    panels = (
        (
            "Bidirectional",
            "Stages 1 and 3. Two documents share a row; every token sees all of its own and nothing of the other.",
            spans.bidirectional(spans.segments([6, 6], 13)),
            packed_kinds,
        ),
        (
            "Truncated at <EOS>",
            "Stage 2. Block A is the picture, B its words. B sees A through <EOS> alone, so A has to fit into it.",
            spans.truncated(document, bridge),
            bridged_kinds,
        ),
        (
            "Truncated, strict",
            "Stage 2, the stricter reading. <EOS> does not look at the block that it will help to rebuild.",
            spans.truncated(document, bridge, strict=True),
            bridged_kinds,
        ),
    )
    figures = [
        element(
            "figure",
            {"class": "panel"},
            matrix_chart(span.as_mask(len(kinds)), kinds, f"{title}: {note}"),
            element("figcaption", {}, element("strong", {}, title), element("span", {"class": "note"}, note)),
        )
        for title, note, span, kinds in panels
    ]
    names = (
        ("a", "block A, or the first document"),
        ("eos", "<EOS>"),
        ("b", "block B, or the second"),
        ("pad", "padding"),
    )
    keys = [element("span", {"class": "key"}, element("i", {"class": f"slot {kind}"}), name) for kind, name in names]
    return [element("p", {"class": "legend"}, *keys), element("div", {"class": "panels"}, *figures)]


def map_part(points: Sequence[MapPoint]) -> list[Element]:
    """Every picture at its place; hovering or touching one enlarges it and tells its name."""
    size = 78 / max(len(points), 16) ** 0.5
    pins = [
        element(
            "img",
            {
                "src": picture_uri(point.picture),
                "alt": point.label,
                "title": point.label,
                "style": f"left:{_inside(point.x):.2f}%;top:{_inside(1 - point.y):.2f}%",
            },
        )
        for point in points
    ]
    sheet = element("div", {"class": "sheet", "style": f"--size:{size:.2f}%"}, *pins)
    return [element("div", {"class": "map"}, sheet)]


def _inside(fraction: float) -> float:
    return 100 * min(max(fraction, 0.0), 1.0)


def _picture(data: bytes, alt: str) -> Element:
    return element("img", {"src": picture_uri(data), "alt": alt, "loading": "lazy"})
