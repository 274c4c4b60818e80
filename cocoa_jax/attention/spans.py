"""One description of visibility for every attention: query q sees key k iff ``start[q] <= k < end[q]``.

All constructors take and give numpy or jax arrays alike, so that the host that builds rows and the
device that runs them share one definition. Padding slots carry the empty span (0, 0).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

Array = Any  # numpy or jax: both follow the array API that the functions below use


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """The half-open interval of keys that each query sees.

    Args:
        start: int32 [..., T], first visible key of each query.
        end: int32 [..., T], one past the last; ``end <= start`` means that the query sees nothing.
    """

    start: Array
    end: Array

    def as_mask(self, keys: int) -> Bool[Array, "... T S"]:
        """The dense mask over ``keys`` key slots, O(T S) memory: for oracles and drawings."""
        k = self.start.__array_namespace__().arange(keys)
        return (self.start[..., None] <= k) & (k < self.end[..., None])

    def within(self, first: int, last: int) -> Spans:
        """The part of every interval that lies among the keys [first, last), counted from ``first``; int32."""
        xp = self.start.__array_namespace__()
        return Spans(*((xp.clip(a, first, last) - first).astype(np.int32) for a in (self.start, self.end)))


def segments(lengths: Sequence[int], total: int) -> Spans:
    """Segments packed side by side from slot 0, each token seeing its own segment; int32 [total].

    Raises:
        ValueError: the lengths do not fit into ``total`` slots.
    """
    sizes = np.asarray(lengths, np.int32).reshape(-1)
    if sizes.sum() > total:
        raise ValueError(f"segments of {int(sizes.sum())} tokens do not fit into {total} slots: raise the row length")
    ends = np.cumsum(sizes, dtype=np.int32)
    start, end = np.zeros(total, np.int32), np.zeros(total, np.int32)
    used = int(sizes.sum())
    start[:used], end[:used] = np.repeat(ends - sizes, sizes), np.repeat(ends, sizes)
    return Spans(start, end)


def bidirectional(segment: Spans) -> Spans:
    """Every token sees its whole segment: the segments themselves."""
    return segment


def causal(segment: Spans) -> Spans:
    """Every token sees its segment up to and including itself."""
    xp = segment.start.__array_namespace__()
    return Spans(segment.start, xp.minimum(segment.end, _index(segment) + 1))


def truncated(segment: Spans, bridge: Spans, strict: bool = False) -> Spans:
    """Block A and block B of a segment see each other only through the bridge tokens between them.

    Args:
        segment: the document of each token.
        bridge: the interval [e, e + K) of bridge tokens of each token's own document, same shape.
        strict: whether the bridge is kept from block B, which it will help to rebuild.

    Source: CoCoA, arXiv 2603.01471, stage 2; the strict form is ours.
    """
    xp, q = segment.start.__array_namespace__(), _index(segment)
    in_a, in_b = q < bridge.start, q >= bridge.end
    start = xp.where(in_b, bridge.start, segment.start)
    end = xp.where(~in_b if strict else in_a, bridge.end, segment.end)
    real = segment.end > segment.start
    return Spans(xp.where(real, start, 0), xp.where(real, end, 0))


def _index(spans: Spans) -> Int[Array, " T"]:
    return spans.start.__array_namespace__().arange(spans.start.shape[-1], dtype=spans.start.dtype)
