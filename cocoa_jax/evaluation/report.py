"""The report of a run: one self-contained HTML file that a person wants to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoa_jax.evaluation import report_parts, score_parts
from cocoa_jax.evaluation.markup import Child, Element, element
from cocoa_jax.evaluation.page import contents, document, section, write_whole
from cocoa_jax.evaluation.projection import project_2d
from cocoa_jax.evaluation.report_data import Curve, GalleryRow, Hit, MapPoint, Reconstruction, ReportData, read_curve

__all__ = [
    "Curve",
    "GalleryRow",
    "Hit",
    "MapPoint",
    "Reconstruction",
    "ReportData",
    "project_2d",
    "read_curve",
    "write_report",
]

_NOTES = {
    "scores": "How often the nearest candidate is a right one. Means are over tasks; "
    "a tie between different candidates counts as a miss.",
    "losses": "One panel a stage: every step faintly, a smoothed course on top, and where it ended. "
    "Small lines: everything else that was measured.",
    "neighbours": "A query and the candidates nearest to it, nearest first, with their cosines. "
    "✓ is a right answer, ✗ a wrong one. Queries are spread evenly over each task, not chosen by how they went.",
    "reconstructions": "Stage 1 hides units of a picture behind noise and asks for them back. "
    "Left to right: what the model saw, what its head drew, what it was.",
    "visibility": "Rows ask, columns answer: a filled cell is a key that the query sees. "
    "Every mask of the method is one interval of keys per query.",
    "map": "The first two principal components of the test pictures' embeddings, "
    "moved apart until they can be told from each other.",
}


def write_report(path: Path, data: ReportData) -> None:
    """Writes the page to `path`, whole or not at all.

    Raises ValueError for scores outside 0..1, pictures of unknown encoding, and arrays that are not uint8 [h, w, 3].
    """
    write_whole(path, _page(data))


def _page(data: ReportData) -> Element:
    scores = score_parts.read_scores(data.results)
    sections = list(_sections(data, scores))
    top: list[Child] = [
        element("p", {"class": "eyebrow"}, "CoCoA: multimodal embeddings"),
        element("h1", {}, data.title),
        element("ol", {"class": "summary"}, *(element("li", {}, sentence) for sentence in data.summary)),
    ]
    if scores:
        top.append(score_parts.headline(scores))
    main = [part for _, part in sections]
    top.append(contents([title for title, _ in sections], main))
    return document(data.title, ["report.css"], top, main, _footer(data.results))


def _sections(data: ReportData, scores: Sequence[score_parts.Score]) -> Iterator[tuple[str, Element]]:
    """Link and section of everything that there is something to show of, in the order of the page."""
    if scores:
        table = [score_parts.legend(), score_parts.score_table(scores)]
        yield "Scores", _section("scores", "Scores", table)
    if any(report_parts.drawable(curve) for curve in data.curves):
        yield "Losses", _section("losses", "Losses", report_parts.curves_part(data.curves))
    if data.gallery:
        yield "Neighbours", _section("neighbours", "Nearest neighbours", report_parts.gallery_part(data.gallery))
    if data.reconstructions:
        triples = report_parts.reconstructions_part(data.reconstructions)
        yield "Reconstructions", _section("reconstructions", "Masked and drawn", triples)
    yield "Visibility", _section("visibility", "Who sees whom", report_parts.visibility_part())
    if data.points:
        yield "Map", _section("map", "A map of the test pictures", report_parts.map_part(data.points))


def _section(name: str, title: str, content: Sequence[Element]) -> Element:
    return section(name, title, _NOTES[name], content)


def _footer(results: Mapping[str, Any]) -> Element:
    children: list[Child] = []
    if "seconds" in results:
        children.append(element("p", {}, f"Time: {_time(results['seconds'])}."))
    if results.get("config"):
        text = json.dumps(results["config"], indent=2, ensure_ascii=False, default=str)
        children.append(element("details", {}, element("summary", {}, "Configuration"), element("pre", {}, text)))
    children.append(
        element("p", {}, "Method: CoCoA, arXiv 2603.01471. This file is complete in itself and loads nothing.")
    )
    return element("footer", {}, *children)


def _time(seconds: Any) -> str:
    """Seconds, or seconds by name, in words."""
    if isinstance(seconds, Mapping):
        return ", ".join(f"{name} {_time(part)}" for name, part in seconds.items())
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
