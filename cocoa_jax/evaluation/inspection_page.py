"""The page of `cocoa data inspect`: real rows drawn, in one file that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cocoa_jax.evaluation.charts import matrix_chart
from cocoa_jax.evaluation.inspection import Document, DrawnRow
from cocoa_jax.evaluation.markup import Child, Element, element, encode_webp
from cocoa_jax.evaluation.page import document, section, write_whole


def write_page(
    path: Path, title: str, facts: Sequence[str], datasets: Sequence[Mapping[str, str]], rows: Sequence[DrawnRow]
) -> None:
    """Write the page whole or not at all.

    Args:
        facts: sentences under the title.
        datasets: rows of the table of data sets, all of the same keys.
    """
    write_whole(path, _page(title, facts, datasets, rows))


def _page(title: str, facts: Sequence[str], datasets: Sequence[Mapping[str, str]], rows: Sequence[DrawnRow]) -> Element:
    header = [
        element("p", {"class": "eyebrow"}, "CoCoA: what the model is fed"),
        element("h1", {}, title),
        element("ol", {"class": "summary"}, *(element("li", {}, fact) for fact in facts)),
    ]
    parts = [section("datasets", "Data sets", "What this stage draws from.", [_table(datasets)])]
    for number, row in enumerate(rows):
        parts.append(section(f"row-{number}", f"Row {number}", _said(row), _row(row)))
    return document(title, ["report.css", "inspection.css"], header, parts, _footer())


def _said(row: DrawnRow) -> str:
    tokens, patches = (sum(part) for part in zip(*((d.tokens, d.patches) for d in row.documents), strict=True))
    count = len(row.documents)
    text = f"{count} document{'s fill' if count > 1 else ' fills'} {tokens} of {row.tokens} token slots"
    return f"{text} and {patches} of {row.patches} patch slots." if row.patches else f"{text}."


def _table(datasets: Sequence[Mapping[str, str]]) -> Element:
    names = list(datasets[0])
    head = element("tr", {}, *(element("th", {"scope": "col"}, name) for name in names))
    body = [element("tr", {}, *(element("td", {}, each[name]) for name in names)) for each in datasets]
    table = element("table", {"class": "datasets"}, element("thead", {}, head), element("tbody", {}, *body))
    return element("div", {"class": "wide"}, table)


def _row(row: DrawnRow) -> list[Element]:
    strips = [
        element("div", {"class": "strips"}, _strip("tokens", _token_parts(row.documents), row.tokens)),
        element("div", {"class": "strips"}, _strip("patches", _patch_parts(row.documents), row.patches)),
    ]
    documents = [_document(document, place) for place, document in enumerate(row.documents)]
    chart = matrix_chart(row.mask, row.kinds, "who sees whom in this row")
    note = element(
        "p",
        {"class": "note"},
        "Rows ask, columns answer. Of a run of image tokens its ends and every eighth are drawn.",
    )
    figure = element("figure", {"class": "sees"}, chart, note)
    return [*strips, _legend(row.documents), element("div", {"class": "documents"}, *documents), figure]


def _has_blocks(documents: Sequence[Document]) -> bool:
    """Whether colours tell blocks apart, as in stage 2, or else neighbouring documents."""
    return any({piece.kind for piece in document.pieces} >= {"a", "b"} for document in documents)


def _token_parts(documents: Sequence[Document]) -> list[tuple[int, str]]:
    """Size and class of each part of a strip of tokens, in the colours of the legend."""
    if not _has_blocks(documents):
        return [(document.tokens, "ab"[place % 2]) for place, document in enumerate(documents)]
    parts = []
    for shown in documents:
        bridge, b = (sum(piece.kind == kind for piece in shown.pieces) for kind in ("eos", "b"))
        parts += [(shown.tokens - bridge - b, "a new"), (bridge, "eos"), (b, "b")]
    return parts


def _patch_parts(documents: Sequence[Document]) -> list[tuple[int, str]]:
    if _has_blocks(documents):
        return [(document.patches, "a new") for document in documents]
    return [(document.patches, "ab"[place % 2]) for place, document in enumerate(documents)]


def _strip(name: str, parts: Sequence[tuple[int, str]], total: int) -> Element:
    pieces: list[Child] = [
        element("i", {"class": f"part {kind}", "style": f"flex-grow:{size}", "title": f"{size} {name}"})
        for size, kind in parts
        if size
    ]
    filled = sum(size for size, _ in parts)
    if rest := total - filled:
        pieces.append(element("i", {"class": "part rest", "style": f"flex-grow:{rest}", "title": f"{rest} unused"}))
    used = 100 * filled / total if total else 0
    label = element("span", {"class": "label"}, f"{name} {used:.0f} %")
    return element("div", {"class": "strip"}, label, element("div", {"class": "bar parts"}, *pieces))


def _legend(documents: Sequence[Document]) -> Element:
    """What of the colours these documents show."""
    blocks = _has_blocks(documents)
    keys = [("a", "block A" if blocks else "a document")]
    if any(piece.kind == "eos" for document in documents for piece in document.pieces):
        keys.append(("eos", "bridge" if blocks else "where it is embedded"))
    if blocks or len(documents) > 1:
        keys.append(("b", "block B" if blocks else "the next document"))
    shown = [element("span", {"class": "key"}, element("i", {"class": f"slot {kind}"}), text) for kind, text in keys]
    if any(piece.hidden for document in documents for piece in document.pieces):
        shown.append(element("span", {"class": "key"}, element("i", {"class": "token hidden a"}, "word"), "hidden"))
    if any(document.hidden_units for document in documents):
        shown.append(
            element("span", {"class": "key"}, element("i", {"class": "slot veil"}), "hidden part of a picture")
        )
    return element("div", {"class": "legend"}, *shown)


def _document(document: Document, place: int) -> Element:
    pictures = [
        element("img", {"src": _uri(picture), "alt": f"picture of {document.role or place}"})
        for picture in document.pictures
    ]
    tokens = [
        element("span", {"class": f"token {p.kind}{' hidden' if p.hidden else ''}"}, p.text or "�")
        for p in document.pieces
    ]
    hidden = sum(piece.hidden for piece in document.pieces)
    said = f"{document.role}: {document.tokens} tokens" + (f", {hidden} hidden" if hidden else "")
    if document.hidden_units:
        said += f", {document.hidden_units} of {document.units} parts of its pictures hidden"
    return element(
        "article",
        {"class": "document"},
        element("p", {"class": "note"}, said),
        element("div", {"class": "shown"}, *pictures),
        element("p", {"class": "tokens"}, *tokens),
    )


def _uri(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((224, 224))
    return "data:image/webp;base64," + base64.b64encode(encode_webp(image)).decode("ascii")


def _footer() -> Element:
    text = "Drawn from the arrays that a step is given, not from the files. This page loads nothing."
    return element("footer", {}, element("p", {}, text))
