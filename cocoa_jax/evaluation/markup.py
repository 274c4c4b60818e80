"""HTML and SVG as trees of elements, so that escaping and balance hold by construction."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from xml.etree import ElementTree

from PIL import Image

Element = ElementTree.Element
Child = Element | str

# What XML forbids and HTML shows as rubbish: control characters other than tab and line ends.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# A picture of more bytes than this is drawn smaller first: the page stays one file that a browser opens at once.
_LARGEST_PICTURE = 24_000
_LONGEST_SIDE = 224


def element(tag: str, attributes: Mapping[str, str | float] | None = None, *children: Child) -> Element:
    """One element with its attributes and, in order, its child elements and texts."""
    node = Element(tag, {name: _plain(_number(value)) for name, value in (attributes or {}).items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, str):
            text = _plain(child)
            if last is None:
                node.text = (node.text or "") + text
            else:
                last.tail = (last.tail or "") + text
        else:
            node.append(child)
            last = child
    return node


def render(root: Element) -> str:
    """The element as HTML text: void elements unclosed, texts and attributes escaped."""
    return ElementTree.tostring(root, encoding="unicode", method="html")


def picture_uri(data: bytes) -> str:
    """A data URI of an encoded picture; a large one is drawn smaller first.

    Raises ValueError if the bytes are not PNG, JPEG, GIF or WebP.
    """
    mime = sniff_mime(data)
    if len(data) > _LARGEST_PICTURE:
        with Image.open(io.BytesIO(data)) as picture:
            small = picture.convert("RGB")
        small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        data, mime = encode_webp(small), "image/webp"
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def encode_webp(picture: Image.Image) -> bytes:
    """The picture as WebP bytes, at a quality where blocks are invisible."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=90, method=4)
    return file.getvalue()


def sniff_mime(data: bytes) -> str:
    """The media type that the first bytes of an encoded picture announce."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise ValueError(f"picture begins with {data[:8]!r}, which is not PNG, JPEG, GIF or WebP; encode it as one of them")


def _plain(text: str) -> str:
    # A lone surrogate cannot be written as UTF-8, so it becomes the replacement character too.
    return _CONTROL.sub("\ufffd", text).encode("utf-8", "replace").decode("utf-8")


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
