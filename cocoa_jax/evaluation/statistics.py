"""What the ranks of a set come to: rates, their bootstrap intervals, and means over sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cocoa_jax.evaluation.scorer import Ranks

RESAMPLES = 2000
LEVEL = 0.95  # of an interval
BINS = 80  # of a histogram of cosines from -1 to 1


def summarise(ranks: Ranks) -> dict[str, Any]:
    """Rates over the queries of one set; a tie of right and wrong candidates counts as wrong.

    ``argmax_p_at_1`` is the published rule: argmax over candidates of which the right one is listed first, which
    takes every tie as right.
    """
    first = ranks.level == 0
    low, high = interval(resampled(first.astype(np.float64)))
    return {
        "p_at_1": float(first.mean()),
        "p_at_1_interval": [low, high],
        "argmax_p_at_1": float((ranks.above == 0).mean()),
        "ties": int(ranks.tied.sum()),
        "hit_at_5": float((ranks.level < 5).mean()),
        "hit_at_10": float((ranks.level < 10).mean()),
        "mrr": float((1 / (1 + ranks.level)).mean()),
    }


def resampled(values: Float[np.ndarray, " n"], seed: int = 0) -> Float[np.ndarray, " resamples"]:
    """The mean of ``RESAMPLES`` samples of n values drawn with replacement."""
    rng = np.random.default_rng((seed, len(values)))
    means = np.empty(RESAMPLES)
    for place in range(RESAMPLES):  # one at a time: a set of a million queries must not take a gigabyte
        means[place] = values[rng.integers(len(values), size=len(values))].mean()
    return means


def interval(means: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """The middle ``LEVEL`` of resampled means."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def histogram(cosines: Float[np.ndarray, " n"]) -> list[int]:
    """How many finite cosines fall into each of ``BINS`` equal parts of [-1, 1]."""
    kept = np.clip(cosines[np.isfinite(cosines)], -1, 1)
    return [int(count) for count in np.histogram(kept, BINS, (-1, 1))[0]]


def group_means(
    scores: Mapping[str, float], groups: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, int, int] | None]:
    """The unweighted mean over the sets of each group, how many of them are there, and how many there should be.

    Args:
        scores: of each set.
        groups: names of the sets of each group; None is given for a group of which there is none.
    """
    means: dict[str, tuple[float, int, int] | None] = {}
    for group, names in groups.items():
        found = [scores[name] for name in names if name in scores]
        means[group] = (float(np.mean(found)), len(found), len(names)) if found else None
    return means
