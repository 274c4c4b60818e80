"""From embeddings to places on a sheet of paper."""

from __future__ import annotations

import numpy as np

_ROUNDS = 60
# Of the spacing that n points have on a square grid: below 1 there is room to move, so that the rounds settle.
_SPACING = 0.92
# The part of all places that counts as the neighbours across.
_NEIGHBOURS = 0.3
_GOLDEN_ANGLE = 2.399963229728653


def project_2d(embeddings: np.ndarray) -> np.ndarray:
    """Places [n, 2] in the unit square for embeddings [n, D]: neighbours stay close, hardly any place is taken twice.

    The first two principal components, sign fixed by the largest loading, then ranks for either axis, then a few rounds
    in which places that are too close push each other apart. The same input gives the same output.
    Raises ValueError for anything but a finite matrix.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings have shape {embeddings.shape}, expected [n, D]; flatten or stack them first")
    if not np.isfinite(embeddings).all():
        rows = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        raise ValueError(f"embedding {rows[0]} is not finite ({len(rows)} such rows); leave them out of the map")
    if len(embeddings) == 0:
        return np.zeros((0, 2))
    return _spread(_ranks(_principal(embeddings.astype(np.float64))))


def _principal(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=0)
    loadings = np.linalg.svd(centred, full_matrices=False)[2][:2]
    strongest = np.abs(loadings).argmax(axis=1)
    loadings = loadings * np.where(loadings[np.arange(len(loadings)), strongest] < 0, -1.0, 1.0)[:, None]
    places = np.zeros((len(rows), 2))
    places[:, : len(loadings)] = centred @ loadings.T
    return places


def _ranks(places: np.ndarray) -> np.ndarray:
    """Ranks across, and down ranks among the neighbours across: the square fills evenly even if the axes depend."""
    # Rounded, so that ties do not depend on the last bit of a matrix product.
    rounded = np.round(places / max(np.abs(places).max(), 1e-30), 9)
    count = len(places)
    order = np.argsort(rounded[:, 0], kind="stable")
    reach = max(1, round(count * _NEIGHBOURS / 2))
    ranks = np.empty_like(places)
    for place, index in enumerate(order):
        first = min(max(0, place - reach), max(0, count - 2 * reach - 1))
        others = rounded[order[first : first + 2 * reach + 1], 1]
        own = rounded[index, 1]
        ranks[index] = (place + 0.5) / count, ((others < own).sum() + (others <= own).sum()) / (2 * len(others))
    return ranks


def _spread(places: np.ndarray) -> np.ndarray:
    count = len(places)
    wanted = _SPACING / np.sqrt(count)
    angles = np.arange(count) * _GOLDEN_ANGLE
    places = places + 1e-3 * wanted * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for _ in range(_ROUNDS):
        away = places[:, None] - places[None]
        distance = np.sqrt((away**2).sum(axis=-1))
        np.fill_diagonal(distance, np.inf)
        push = np.maximum(wanted - distance, 0.0) / np.maximum(distance, 1e-9)
        places = np.clip(places + 0.4 * (push[..., None] * away).sum(axis=1), 0.0, 1.0)
    return places
