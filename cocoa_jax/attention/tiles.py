"""Which tiles of the score matrix somebody sees, and which of those need a mask.

The [T, S] scores of a row are cut into tiles of ``Blocks.query`` queries by ``Blocks.key`` keys. Every mask of the
method makes the tiles that a block of queries sees, and those that a block of keys is seen by, one unbroken run: a
*hull* [lo, hi) of blocks. Spans that leave a gap inside a hull stay exact: nobody sees the tile in the gap, so it is
masked to nothing. Everything works on numpy and jax arrays alike, and under jit.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from cocoa_jax.attention.spans import Spans

Array = Any  # numpy or jax, as in spans.py
FIRST, LAST, COMPUTE, MASK = 1, 2, 4, 8  # flags of a listed tile, see ``tile_list``


class Blocks(NamedTuple):
    """The size of a tile in queries and keys."""

    query: int
    key: int

    def grid(self, queries: int, keys: int) -> tuple[int, int]:
        """The number of blocks of queries and of keys; the last of each may be partly outside."""
        return -(-queries // self.query), -(-keys // self.key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hulls:
    """The key blocks that each query block visits: tile (i, j) is visited iff ``lo[i] <= j < hi[i]``.

    A visited tile is fully visible, so needs no mask, iff also ``full_lo[i] <= j < full_hi[i]``. A query block with
    slots beyond T is never full, nor is a key block with slots beyond S. A block that sees nothing has lo = hi = 0.

    Args:
        lo: int32 [B, Q], first visited key block.
        hi: int32 [B, Q], one past the last.
        full_lo: int32 [B, Q], first fully visible key block.
        full_hi: int32 [B, Q], one past the last; ``full_hi <= full_lo`` where there is none.
    """

    lo: Array
    hi: Array
    full_lo: Array
    full_hi: Array

    def full(self, j: Array) -> Bool[Array, "B Q *J"]:
        """Whether the tiles of key blocks ``j`` ([B, Q] or [B, Q, J] by broadcasting) are fully visible."""
        extra = j.ndim - self.lo.ndim
        lo, hi = (a.reshape(*a.shape, *[1] * extra) for a in (self.full_lo, self.full_hi))
        return (lo <= j) & (j < hi)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileList:
    """Tiles to visit in order, the rows of the batch one after the other; entries past ``count`` repeat the last one.

    Every block of the outer axis has at least one entry, so that its output is written even if nobody sees it.

    Args:
        row: int32 [N], the row of the batch.
        query: int32 [N], block of queries.
        key: int32 [N], block of keys.
        flags: int32 [N], a sum of ``FIRST`` (begins a block of the outer axis), ``LAST`` (ends one), ``COMPUTE``
            (inside the hull) and ``MASK`` (inside, but not fully visible); 0 past ``count``.
        count: int32 [], how many entries are real. It may exceed N where the caller gave too small a bound.
    """

    row: Array
    query: Array
    key: Array
    flags: Array
    count: Array


class Counts(NamedTuple):
    """Tiles of a batch: all of them, those inside the hulls, and those of them that need a mask."""

    total: int
    visited: int
    masked: int


def query_hulls(spans: Spans, keys: int, blocks: Blocks) -> Hulls:
    """The hulls of every block of queries; O(T) work and O(T / block) memory.

    Args:
        spans: int32 [B, T] each.
        keys: S, the number of keys; spans are cut at it.
        blocks: the size of a tile.
    """
    xp = spans.start.__array_namespace__()
    size = blocks.key
    start, end = xp.clip(spans.start, 0, keys), xp.clip(spans.end, 0, keys)
    sees = end > start
    far = keys + size
    first = _blocked(xp.where(sees, start, far), blocks.query, far).min(-1)
    last = _blocked(xp.where(sees, end, 0), blocks.query, 0).max(-1)
    some = last > 0
    # The keys that all queries of a block see; an empty span, or a slot beyond T, sees none.
    common_start = _blocked(xp.where(sees, start, far), blocks.query, far).max(-1)
    common_end = _blocked(xp.where(sees, end, 0), blocks.query, 0).min(-1)
    lo, hi = xp.where(some, first // size, 0), -(-last // size)
    return Hulls(*(a.astype(np.int32) for a in (lo, hi, -(-common_start // size), common_end // size)))


def key_hulls(hulls: Hulls, key_blocks: int) -> tuple[Int[Array, "B J"], Int[Array, "B J"]]:
    """The query blocks [lo, hi) that visit each of ``key_blocks`` key blocks; 0, 0 where there is none."""
    xp = hulls.lo.__array_namespace__()
    queries = hulls.lo.shape[-1]
    j, i = xp.arange(key_blocks, dtype=np.int32), xp.arange(queries, dtype=np.int32)[:, None]
    visited = (hulls.lo[..., None] <= j) & (j < hulls.hi[..., None])  # fused into the two reductions by XLA
    hi = xp.where(visited, i + 1, 0).max(-2)
    lo = xp.where(visited, i, queries).min(-2)
    return xp.where(hi > 0, lo, 0).astype(np.int32), hi.astype(np.int32)


def tile_bound(queries: int, keys: int, blocks: Blocks, longest: int | None = None) -> int:
    """The most tiles that one row can list, whichever axis is the outer one.

    Args:
        queries: T.
        keys: S.
        blocks: the size of a tile.
        longest: length of the longest segment where it is known (the patches of one picture, a window): segments
            side by side, each query seeing keys of its own segment only, T = S. None allows any spans.
    """
    Q, J = blocks.grid(queries, keys)
    if longest is None:
        return Q * J
    # A block reaches from the start of its first segment to the end of its last one.
    by_query = Q * min(J, (blocks.query + 2 * longest - 4 + blocks.key) // blocks.key + 1)
    by_key = J * min(Q, (blocks.key + 2 * longest - 4 + blocks.query) // blocks.query + 1)
    return max(by_query, by_key)


def tile_list(hulls: Hulls, key_blocks: int, outer: Literal["query", "key"], bound: int) -> TileList:
    """The visited tiles of all rows in the order of the ``outer`` axis, at most ``bound`` of them.

    Args:
        hulls: of the query blocks.
        key_blocks: how many blocks of keys there are.
        outer: "query" lists the key blocks of each query block, "key" the query blocks of each key block.
        bound: N, the static length of the list: rows x ``tile_bound``.
    """
    xp = hulls.lo.__array_namespace__()
    lo, hi = (hulls.lo, hulls.hi) if outer == "query" else key_hulls(hulls, key_blocks)
    per_row = lo.shape[-1]
    sizes = xp.maximum(hi - lo, 1).reshape(-1)
    ends = xp.cumsum(sizes, dtype=np.int32)
    count = ends[-1]
    entry = xp.arange(bound, dtype=np.int32)
    at = xp.minimum(entry, count - 1)
    block = xp.searchsorted(ends, at, side="right").astype(np.int32)
    step = at - (ends - sizes)[block]
    inner = lo.reshape(-1)[block] + step
    row, outer_index = block // per_row, block % per_row
    query, key = (outer_index, inner) if outer == "query" else (inner, outer_index)
    full = (hulls.full_lo[row, query] <= key) & (key < hulls.full_hi[row, query])
    compute = (hi > lo).reshape(-1)[block]
    flags = FIRST * (step == 0) + LAST * (step == sizes[block] - 1) + COMPUTE * compute + MASK * (compute & ~full)
    flags = xp.where(entry < count, flags, 0)
    return TileList(*(a.astype(np.int32) for a in (row, query, key, flags, count)))


def count_tiles(spans: Spans, keys: int, blocks: Blocks) -> Counts:
    """Visited and masked tiles of concrete spans [B, T], for reports."""
    hulls = query_hulls(Spans(np.asarray(spans.start), np.asarray(spans.end)), keys, blocks)
    rows, queries = hulls.lo.shape
    key_blocks = blocks.grid(spans.start.shape[-1], keys)[1]
    visited = int((hulls.hi - hulls.lo).sum())
    unmasked = int(np.maximum(hulls.full_hi - hulls.full_lo, 0).sum())
    return Counts(rows * queries * key_blocks, visited, visited - unmasked)


def _blocked(a: Int[Array, "B T"], size: int, fill: int) -> Int[Array, "B Q size"]:
    """Cut into blocks of ``size``, the last one filled up."""
    xp = a.__array_namespace__()
    missing = -a.shape[-1] % size
    if missing:
        a = xp.concat([a, xp.full((*a.shape[:-1], missing), fill, dtype=a.dtype)], axis=-1)
    return a.reshape(*a.shape[:-1], -1, size)
