"""Attention under spans in plain JAX that computes only the tiles somebody sees, for CPUs and GPUs.

Memory is O(T + S): one tile of scores at a time, keys and values never repeated for the heads that share them.
The softmax runs over the tiles of a block of queries (online softmax, arXiv 1805.02867), and the backward pass makes
the weights again from the log-sum-exp (FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from cocoa_jax.attention.spans import Spans
from cocoa_jax.attention.tiles import Blocks, Hulls, query_hulls

KEYS = 256  # of a tile
ROWS = 512  # queries of a tile, twice as many where one block holds the row: more skip less
SCORES = 6 * 512 * 512  # of a step: they and their weights take 12 MiB in float32, and the processor's caches hold them
OUT, LSE = "span_attention_out", "span_attention_lse"  # what a remat policy keeps: no second forward pass
HIDDEN = -1e30  # score of a hidden key
LOWEST = -1e29  # where the running maximum starts: above HIDDEN, so that hidden keys weigh exp(-9e29) = 0


class Cut(NamedTuple):
    """How the scores are cut.

    Args:
        blocks: queries and keys of a tile.
        heads: key heads that a tile holds side by side; they divide K.
        run: fully visible tiles of a block of queries that are taken at once.
    """

    blocks: Blocks
    heads: int
    run: int


class Place(NamedTuple):
    """A block of queries: its row, its group of heads, and its number in the row."""

    row: Array
    group: Array
    block: Array


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spans: Spans,
    scale: float,
    cut: Cut | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention, statistics in float32, over the keys that each query sees; see ``api.attend``.

    ``cut`` need not divide the rows: they are filled up. None takes what suits a CPU.
    """
    spans = spans.within(0, k.shape[1])  # the last block of keys is filled up with zeros, which nobody may see
    if jnp.finfo(q.dtype).bits >= 32:  # once for each query rather than for each score; bfloat16 would round again
        q, scale = q * scale, 1.0
    arrays = _vary_together([q, k, v, jnp.asarray(spans.start), jnp.asarray(spans.end)])
    return _attend(scale, cut or cut_for(q.shape[1], k.shape[1], q.shape[2], k.shape[2]), *arrays)


def cut_for(queries: int, keys: int, heads: int, key_heads: int) -> Cut:
    """The cut for T queries, S keys, N heads and K key heads: equal blocks, and as many heads as ``SCORES`` allows."""
    shared = heads // key_heads
    run = 2 if queries > 2 * ROWS else 1
    block = _fit(queries, min(ROWS * 2 // run, max(SCORES // (shared * KEYS * run), 64)))
    most = SCORES // (block * shared * KEYS * run)
    groups = max((g for g in range(1, key_heads + 1) if key_heads % g == 0 and g <= most), default=1)
    return Cut(Blocks(block, _fit(keys, KEYS)), groups, run)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, cut: Cut, q: Array, k: Array, v: Array, start: Array, end: Array) -> Array:
    return _batched(functools.partial(_forward, scale, cut))(q, k, v, start, end)[0]


def _attend_forward(scale: float, cut: Cut, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = _batched(functools.partial(_forward, scale, cut))(*arrays)
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return out, (*arrays, out, lse)


def _attend_backward(
    scale: float, cut: Cut, saved: tuple[Array, ...], g: Array
) -> tuple[Array, Array, Array, None, None]:
    dq, dk, dv = _batched(functools.partial(_backward, scale, cut))(*saved, g)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


class _Grid:
    """The blocks of one call: reads and writes them in the layouts in which XLA multiplies fast.

    A block of queries is [C, M, H]: C key heads of a group, M = queries x N / K, so that the heads which share a key
    head are one matrix. A block of keys is [C, size, H].
    """

    def __init__(self, cut: Cut, q: Array, k: Array, start: Array, end: Array):
        self.size, self.width = cut.blocks
        self.B, self.T, N, self.H = q.shape
        self.S, self.K = k.shape[1:3]
        self.shared, self.heads, self.groups = N // self.K, cut.heads, self.K // cut.heads
        self.blocks = -(-self.T // self.size)
        self.hulls = query_hulls(Spans(start, end), self.S, cut.blocks)
        self.start, self.end = _fill(start, self.size), _fill(end, self.size)

    def count(self) -> int:
        return self.B * self.groups * self.blocks

    def place(self, n: Array) -> Place:
        return Place(n // (self.groups * self.blocks), n // self.blocks % self.groups, n % self.blocks)

    def split_queries(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T G N/G H"]:
        return _fill(x, self.size).reshape(self.B, -1, self.groups, self.heads * self.shared, self.H)

    def join_queries(self, x: Float[Array, "B T G N/G H"]) -> Float[Array, "B T N H"]:
        return x.reshape(self.B, -1, self.K * self.shared, self.H)[:, : self.T]

    def split_keys(self, x: Float[Array, "B S K H"]) -> Float[Array, "B*G C S H"]:
        return _fill(x, self.width).swapaxes(1, 2).reshape(self.B * self.groups, self.heads, -1, self.H)

    def join_keys(self, x: Float[Array, "B*G C S H"]) -> Float[Array, "B S K H"]:
        return x.reshape(self.B, self.K, -1, self.H).swapaxes(1, 2)[:, : self.S]

    def queries(self, x: Float[Array, "B T G N/G H"], at: Place) -> Float[Array, "C M H"]:
        part = jax.lax.dynamic_slice(x, self._corner(at), (1, self.size, 1, *x.shape[3:]))
        part = part.reshape(self.size, self.heads, self.shared, self.H).transpose(1, 2, 0, 3)
        return part.reshape(self.heads, -1, self.H)

    def put_queries(self, x: Float[Array, "B T G N/G H"], part: Array, at: Place) -> Float[Array, "B T G N/G H"]:
        part = part.reshape(self.heads, self.shared, self.size, self.H).transpose(2, 0, 1, 3)
        part = part.reshape(1, self.size, 1, -1, self.H)
        return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), self._corner(at))

    def keys(self, x: Float[Array, "B*G C S H"], at: Place, j: Array, tiles: int) -> Float[Array, "C width H"]:
        corner = (at.row * self.groups + at.group, 0, j * self.width, 0)
        return jax.lax.dynamic_slice(x, corner, (1, self.heads, tiles * self.width, self.H))[0]

    def add_keys(self, x: Float[Array, "B*G C S H"], part: Array, at: Place, j: Array) -> Float[Array, "B*G C S H"]:
        corner = (at.row * self.groups + at.group, 0, j * self.width, 0)
        whole = self.keys(x, at, j, part.shape[1] // self.width) + part
        return jax.lax.dynamic_update_slice(x, whole[None], corner)

    def visible(self, at: Place, j: Array, queries_axis: int) -> Bool[Array, "_ _"]:
        """Which keys of tile j the queries of a block see; these lie along one axis, the keys along the other."""
        cut = [jax.lax.dynamic_slice(x, (at.row, at.block * self.size), (1, self.size)) for x in (self.start, self.end)]
        start, end = (jnp.expand_dims(x[0], 1 - queries_axis) for x in cut)
        key = jnp.expand_dims(j * self.width + jnp.arange(self.width), queries_axis)
        # Made once: XLA would make it again for every head and for every step of the softmax.
        return jax.lax.optimization_barrier((start <= key) & (key < end))

    def _corner(self, at: Place) -> tuple[Array | int, ...]:
        return (at.row, at.block * self.size, at.group, 0, 0)


def _forward(
    scale: float, cut: Cut, q: Array, k: Array, v: Array, start: Array, end: Array
) -> tuple[Float[Array, "B T N H"], Float[Array, "B G Q C M"]]:
    """The output, and the log-sum-exp of the scores of each query by block."""
    grid = _Grid(cut, q, k, start, end)
    q, keys, values = grid.split_queries(q), grid.split_keys(k), grid.split_keys(v)
    rows = (grid.heads, grid.size * grid.shared)

    def block(n: Array, written: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = written
        at = grid.place(n)
        queries = grid.queries(q, at)

        def visit(j: Array, tiles: int, masked: bool, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, sums = carry
            scores = _product("cmh,cnh->cmn", queries, grid.keys(keys, at, j, tiles)) * scale
            if masked:
                scores = _hide(scores, grid.visible(at, j, 0))
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            fade = jnp.exp(top - higher)
            new = _product("cmn,cnh->cmh", weights.astype(values.dtype), grid.keys(values, at, j, tiles))
            return higher, total * fade + weights.sum(-1), sums * fade[..., None] + new

        empty = (_full(rows, LOWEST, q), _full(rows, 0, q), _full((*rows, grid.H), 0, q))
        top, total, sums = _visit(grid.hulls, at, cut.run, visit, empty)
        some = total > 0
        total = jnp.where(some, total, 1)
        # An empty span gets so high a log-sum-exp that its weights vanish in the backward pass.
        statistic = jnp.where(some, top + jnp.log(total), -HIDDEN)
        return grid.put_queries(out, sums / total[..., None], at), lse.at[at].set(statistic)

    empty = (_full(q.shape, 0, q, q.dtype), _full((grid.B, grid.groups, grid.blocks, *rows), 0, q))
    out, lse = jax.lax.fori_loop(0, grid.count(), block, empty)
    return grid.join_queries(out), lse


def _backward(
    scale: float,
    cut: Cut,
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    end: Array,
    out: Array,
    lse: Array,
    g: Array,
) -> tuple[Array, Array, Array]:
    """The gradients of queries, keys and values from that of the output."""
    grid = _Grid(cut, q, k, start, end)
    q, out, g = (grid.split_queries(x) for x in (q, out, g))
    keys, values = grid.split_keys(k), grid.split_keys(v)

    def block(n: Array, written: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at = grid.place(n)
        queries, grads = grid.queries(q, at), grid.queries(g, at)
        inner = jnp.sum(grid.queries(out, at).astype(jnp.float32) * grads, -1)[:, None]
        statistic = lse[at][:, None]

        # Keys down and queries across: a product that sums over the rows of a tile takes XLA twice as long on a CPU,
        # and this way round only that of the queries' gradient does, whose other side is small.
        def visit(j: Array, tiles: int, masked: bool, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            key, value = grid.keys(keys, at, j, tiles), grid.keys(values, at, j, tiles)
            scores = _product("cnh,cmh->cnm", key, queries) * scale
            if masked:
                scores = _hide(scores, grid.visible(at, j, 1))
            weights = jnp.exp(scores - statistic)
            change = weights * (_product("cnh,cmh->cnm", value, grads) - inner)
            weights, change = weights.astype(q.dtype), change.astype(q.dtype)
            dq = dq + _product("cnh,cnm->chm", key, change)
            dk = grid.add_keys(dk, _product("cnm,cmh->cnh", change, queries), at, j)
            return dq, dk, grid.add_keys(dv, _product("cnm,cmh->cnh", weights, grads), at, j)

        dq, *rest = written
        start = _full((grid.heads, grid.H, queries.shape[1]), 0, q)
        own, dk, dv = _visit(grid.hulls, at, cut.run, visit, (start, *rest))
        return grid.put_queries(dq, own.swapaxes(1, 2) * scale, at), dk, dv

    empty = (_full(q.shape, 0, q, q.dtype), _full(keys.shape, 0, q), _full(keys.shape, 0, q))
    dq, dk, dv = jax.lax.fori_loop(0, grid.count(), block, empty)
    return grid.join_queries(dq), grid.join_keys(dk * scale).astype(k.dtype), grid.join_keys(dv).astype(v.dtype)


def _visit(hulls: Hulls, at: Place, run: int, visit: Callable[[Array, int, bool, Any], Any], carry: Any) -> Any:
    """Folds ``visit(j, tiles, masked, carry)`` over the tiles that a query block sees, j being the first of some.

    Three loops rather than a branch in one, whose carry would be copied for every tile: the masked tiles before the
    fully visible ones, ``run`` of these at a time, and what is left, masked.
    """
    lo, hi, full_lo, full_hi = (x[at.row, at.block] for x in (hulls.lo, hulls.hi, hulls.full_lo, hulls.full_hi))
    full_lo = jnp.clip(full_lo, lo, hi)
    runs = jnp.clip(full_hi - full_lo, 0, hi - full_lo) // run
    rest = full_lo + runs * run
    for first, steps, tiles, masked in (
        (lo, full_lo - lo, 1, True),
        (full_lo, runs, run, False),
        (rest, hi - rest, 1, True),
    ):

        def step(n: Array, carry: Any, first: Array = first, tiles: int = tiles, masked: bool = masked) -> Any:
            return visit(first + n * tiles, tiles, masked, carry)

        carry = jax.lax.fori_loop(0, steps, step, carry)
    return carry


def _product(spec: str, a: Array, b: Array) -> Float[Array, "C _ _"]:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _hide(scores: Float[Array, "K X Y"], sees: Bool[Array, "_ _"]) -> Float[Array, "K X Y"]:
    """Scores of hidden keys; the mask is shared by the heads of a block, which lie side by side on either axis."""
    K, X, Y = scores.shape
    x, y = sees.shape
    return jnp.where(sees[:, None, :], scores.reshape(K, X // x, x, Y // y, y), HIDDEN).reshape(K, X, Y)


def _fit(length: int, largest: int) -> int:
    """The smallest block, in steps of 8, that cuts a row into no more blocks than the largest one does."""
    return -(-max(length, 1) // (8 * math.ceil(max(length, 1) / largest))) * 8


def _fill(x: Array, size: int) -> Array:
    """Axis 1 filled up with zeros to a multiple of ``size``: empty spans, and keys that no span contains."""
    missing = -x.shape[1] % size
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]) if missing else x


def _batched(f: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """``f``, to which ``jax.vmap`` gives more rows: a mapped loop would wait for its longest row at every tile."""
    mapped = jax.custom_batching.custom_vmap(f)

    @mapped.def_vmap
    def rule(size: int, batched: Sequence[bool], *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        whole = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, batched, strict=True)]
        out = mapped(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

    return mapped


def _full(shape: Sequence[int], value: float, like: Array, dtype: Any = jnp.float32) -> Array:
    """A constant that varies over the mesh axes over which ``like`` does: the first carry of a loop must."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    made = jnp.full(shape, value, dtype)
    return jax.lax.pcast(made, axes, to="varying") if axes else made


def _vary_together(arrays: Sequence[Array]) -> list[Array]:
    """The arrays, all varying over the same axes of an enclosing ``shard_map``."""
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    found = []
    for x in arrays:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        found.append(jax.lax.pcast(x, missing, to="varying") if missing else x)
    return found
