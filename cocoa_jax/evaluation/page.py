"""A self-contained HTML page: one file that a browser shows without fetching anything."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from cocoa_jax.evaluation.markup import Child, Element, element, render

# The page may show what it carries and nothing else: no browser will fetch anything for it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(
    title: str, styles: Sequence[str], header: Sequence[Child], main: Sequence[Element], footer: Element
) -> Element:
    """The whole page.

    Args:
        styles: style sheets beside this module.
        header, main: what stands in the header, and the sections.
    """
    files = resources.files("cocoa_jax.evaluation")
    style = "".join(files.joinpath(name).read_text(encoding="utf-8") for name in styles)
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", {}, title),
        element("style", {}, style),
    )
    body = element("body", {}, element("header", {}, *header), element("main", {}, *main), footer)
    return element("html", {"lang": "en"}, head, body)


def section(name: str, title: str, note: str, content: Sequence[Element]) -> Element:
    """A section that links lead to by its name; its heading stands beside what it holds."""
    heading = element(
        "div", {"class": "heading"}, element("h2", {"id": f"{name}-title"}, title), element("p", {}, note)
    )
    return element(
        "section",
        {"id": name, "aria-labelledby": f"{name}-title"},
        heading,
        element("div", {"class": "content"}, *content),
    )


def contents(titles: Sequence[str], sections: Sequence[Element]) -> Element:
    """Links to sections."""
    links = [
        element("a", {"href": f"#{part.attrib['id']}"}, title) for title, part in zip(titles, sections, strict=True)
    ]
    return element("nav", {"aria-label": "Contents"}, *links)


def write_whole(path: Path, page: Element) -> None:
    """Writes the page to ``path``, whole or not at all."""
    text = "<!DOCTYPE html>\n" + render(page) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
