"""How embeddings lie on the sphere: how many directions they use, how evenly, and how near pairs are."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_CHUNK = 512  # rows whose distances to all others are held at once


def effective_rank(rows: Float[np.ndarray, "n W"]) -> float:
    """exp of the entropy of the singular values as shares of their sum: 1 for one direction, at most min(n, W).

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    shares = values[values > values.max() * 1e-12] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def uniformity(rows: Float[np.ndarray, "n W"]) -> float:
    """log of the mean of exp(-2 d^2) over all pairs of different rows; 0 where all are equal, lower is more even.

    Source: Wang and Isola, arXiv 2005.10242.
    """
    wide = rows.astype(np.float64)
    total, n = 0.0, len(wide)
    for start in range(0, n, _CHUNK):
        # Rows are of unit length: the squared distance of two is 2 - 2 cosines.
        squares = np.maximum(2 - 2 * wide[start : start + _CHUNK] @ wide.T, 0)
        total += float(np.exp(-2 * squares).sum())
    return float(np.log((total - n) / (n * (n - 1))))


def alignment(rows: Float[np.ndarray, "n W"], partners: Float[np.ndarray, "n W"]) -> float:
    """The mean squared distance of the two sides of a pair; 0 where they are equal."""
    return float(np.square(rows.astype(np.float64) - partners.astype(np.float64)).sum(axis=1).mean())
