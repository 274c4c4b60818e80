"""Right and wrong retrievals of a set, small enough to travel with its results."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cocoa_jax.data.pixels import decode
from cocoa_jax.data.sources import Content
from cocoa_jax.evaluation.distinct import Distinct
from cocoa_jax.evaluation.markup import encode_webp
from cocoa_jax.evaluation.report_data import GalleryRow, Hit
from cocoa_jax.evaluation.scorer import Ranks, similarities

EACH = 3  # of right and of wrong retrievals
_NEAREST = 5
_SIDE = 144  # pixels of a small picture
_LONGEST = 240  # characters of a shown text


def collect(found: Distinct, rows: Float[np.ndarray, "n W"], ranks: Ranks, tokens: int = 1) -> list[dict[str, Any]]:
    """``EACH`` right and as many wrong retrievals as plain values, spread evenly over the queries of their kind.

    Args:
        rows: the embedding of every distinct content.
        tokens: as they were compared.
    """
    right = ranks.level == 0
    picked = [
        int(places[(2 * i + 1) * len(places) // (2 * min(EACH, len(places)))])
        for places in (np.flatnonzero(right), np.flatnonzero(~right))
        for i in range(min(EACH, len(places)))
    ]
    return [_entry(found, rows, ranks, query, tokens) for query in picked]


def shown(name: str, entries: Sequence[Mapping[str, Any]]) -> list[GalleryRow]:
    """The rows of a gallery from what `collect` gave."""
    return [
        GalleryRow(
            name,
            entry["query"],
            _bytes(entry["picture"]),
            tuple(Hit(hit["label"], _bytes(hit["picture"]), hit["cosine"], hit["right"]) for hit in entry["hits"]),
            entry["note"],
        )
        for entry in entries
    ]


def _entry(found: Distinct, rows: Float[np.ndarray, "n W"], ranks: Ranks, query: int, tokens: int) -> dict[str, Any]:
    listed = found.listed(query)
    contents = found.candidates[listed]
    asked = found.queries[query]
    cosines = similarities(rows[asked][None].astype(np.float64), rows[contents].astype(np.float64), tokens)[0]
    right = np.isin(listed, list(found.right[query]))
    # Wrong before right among equals, as they are counted.
    order = np.lexsort((right, -np.round(cosines, 7)))
    best = next(int(i) for i in order if right[i])
    place = int(ranks.level[query]) + 1
    answer = _label(found.contents[int(contents[best])])
    shown = found.contents[int(asked)]
    return {
        "query": shown.text[:_LONGEST],
        "picture": _small(shown),
        "note": f"Right: {answer}, place {place:,} of {len(listed):,}.",
        "hits": [
            {
                "label": _label(content := found.contents[int(contents[i])]),
                "picture": _small(content),
                "cosine": float(cosines[i]),
                "right": bool(right[i]),
            }
            for i in order[:_NEAREST]
        ],
    }


def _label(content: Content) -> str:
    return (content.words or content.text or content.images[0].name)[:_LONGEST]


def _small(content: Content) -> str | None:
    if not content.images:
        return None
    picture = decode(content.images[0]).convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    return base64.b64encode(encode_webp(picture)).decode("ascii")


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
