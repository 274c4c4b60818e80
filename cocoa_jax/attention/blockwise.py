"""Attention under spans in plain JAX that computes only the tiles somebody sees, for CPUs and GPUs.

Memory is O(T + S): one tile of scores at a time, keys and values never repeated for the heads that share them.
The softmax runs over the tiles of a block of queries (online softmax, arXiv 1805.02867), and the backward pass makes
the weights again from the log-sum-exp (FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from cocoa_jax.attention.spans import Spans
from cocoa_jax.attention.tiles import Blocks, Hulls, query_hulls

BLOCKS = Blocks(256, 256)  # a tile of six heads fits into the second-level cache of a core; measured on a CPU
OUT, LSE = "span_attention_out", "span_attention_lse"  # what a remat policy keeps: no second forward pass
HIDDEN = -1e30  # score of a hidden key
LOWEST = -1e29  # where the running maximum starts: above HIDDEN, so that hidden keys weigh exp(-9e29) = 0
Tile = Callable[[Any, Array], Any]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spans: Spans,
    scale: float,
    blocks: Blocks = BLOCKS,
) -> Float[Array, "B T N H"]:
    """Softmax attention, statistics in float32, over the keys that each query sees; see ``api.attend``.

    ``blocks`` is the largest tile: rows that it does not divide are cut into fewer equal blocks and filled up.
    """
    arrays = _vary_together([q, k, v, jnp.asarray(spans.start), jnp.asarray(spans.end)])
    T, S = q.shape[1], k.shape[1]
    fitting = Blocks(_fit(T, blocks.query), _fit(S, blocks.key))
    return _attend(scale, fitting, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, blocks: Blocks, q: Array, k: Array, v: Array, start: Array, end: Array) -> Array:
    return _batched(functools.partial(_forward, scale, blocks))(q, k, v, start, end)[0]


def _attend_forward(scale: float, blocks: Blocks, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = _batched(functools.partial(_forward, scale, blocks))(*arrays)
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return out, (*arrays, out, lse)


def _attend_backward(
    scale: float, blocks: Blocks, saved: tuple[Array, ...], g: Array
) -> tuple[Array, Array, Array, None, None]:
    return *_batched(functools.partial(_backward, scale, blocks))(*saved, g), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    scale: float, blocks: Blocks, q: Array, k: Array, v: Array, start: Array, end: Array
) -> tuple[Float[Array, "B T N H"], Float[Array, "B Q K M"]]:
    """The output, and the log-sum-exp of the scores of each query by block (M = N / K heads of a block's queries)."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    size, rows = blocks.query, blocks.query * N // K
    hulls, (start, end) = query_hulls(Spans(start, end), S, blocks), (_fill(x, size) for x in (start, end))
    q, keys, values = _fill(q, size), _heads_first(_fill(k, blocks.key)), _heads_first(_fill(v, blocks.key))
    Q = q.shape[1] // size

    def block(n: Array, written: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = written
        at = (n // Q, n % Q)
        queries = _queries(q, at, size, K)
        sees = functools.partial(_visible, _cut(start, at, size), _cut(end, at, size), blocks.key)

        def tile(j: Array, masked: bool, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, sums = carry
            key, value = _keys(keys, at, j, blocks.key), _keys(values, at, j, blocks.key)
            scores = _product("kmh,kch->kmc", queries, key) * scale
            if masked:
                scores = _hide(scores, sees(j))
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            fade = jnp.exp(top - higher)
            new = _product("kmc,kch->kmh", weights.astype(value.dtype), value)
            return higher, total * fade + weights.sum(-1), sums * fade[..., None] + new

        empty = (_full((K, rows), LOWEST, q), _full((K, rows), 0, q), _full((K, rows, H), 0, q))
        top, total, sums = _visit(hulls, at, tile, empty)
        some = total > 0
        total = jnp.where(some, total, 1)
        # An empty span gets so high a log-sum-exp that its weights vanish in the backward pass.
        statistic = jnp.where(some, top + jnp.log(total), -HIDDEN)
        return _put(out, _tokens_first(sums / total[..., None], size), at, size), lse.at[at].set(statistic)

    empty = (_full(q.shape, 0, q, q.dtype), _full((B, Q, K, rows), 0, q))
    out, lse = jax.lax.fori_loop(0, B * Q, block, empty)
    return out[:, :T], lse


def _backward(
    scale: float,
    blocks: Blocks,
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
    B, T, _, H = q.shape
    S, K = k.shape[1:3]
    size = blocks.query
    hulls, (start, end) = query_hulls(Spans(start, end), S, blocks), (_fill(x, size) for x in (start, end))
    q, out, g = (_fill(x, size) for x in (q, out, g))
    keys, values = _heads_first(_fill(k, blocks.key)), _heads_first(_fill(v, blocks.key))
    Q = q.shape[1] // size

    def block(n: Array, written: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at = (n // Q, n % Q)
        queries, grads = _queries(q, at, size, K), _queries(g, at, size, K)
        inner = jnp.sum(_queries(out, at, size, K).astype(jnp.float32) * grads, -1)[:, None]
        statistic = lse[at][:, None]
        sees = functools.partial(_visible, _cut(start, at, size), _cut(end, at, size), blocks.key)

        # Keys down and queries across: a product that sums over the rows of a tile takes XLA twice as long on a CPU,
        # and this way round only that of the queries' gradient does, whose other side is small.
        def tile(j: Array, masked: bool, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            key, value = _keys(keys, at, j, blocks.key), _keys(values, at, j, blocks.key)
            scores = _product("kch,kmh->kcm", key, queries) * scale
            if masked:
                scores = _hide(scores, sees(j).T)
            weights = jnp.exp(scores - statistic)
            change = weights * (_product("kch,kmh->kcm", value, grads) - inner)
            weights, change = weights.astype(q.dtype), change.astype(q.dtype)
            dq = dq + _product("kch,kcm->khm", key, change)
            dk = _add(dk, _product("kcm,kmh->kch", change, queries), at, j, blocks.key)
            return dq, dk, _add(dv, _product("kcm,kmh->kch", weights, grads), at, j, blocks.key)

        dq, *rest = written
        now, *rest = _visit(hulls, at, tile, (_full((K, H, queries.shape[1]), 0, q), *rest))
        return _put(dq, _tokens_first(now.swapaxes(1, 2) * scale, size), at, size), *rest

    empty = (_full(q.shape, 0, q, q.dtype), _full(keys.shape, 0, q), _full(keys.shape, 0, q))
    dq, dk, dv = jax.lax.fori_loop(0, B * Q, block, empty)
    dk, dv = (x.swapaxes(1, 2)[:, :S] for x in (dk * scale, dv))
    return dq[:, :T], dk.astype(k.dtype), dv.astype(v.dtype)


def _visit(hulls: Hulls, at: tuple[Array, Array], tile: Callable[[Array, bool, Any], Any], carry: Any) -> Any:
    """Folds ``tile(j, masked, carry)`` over the key blocks that a query block sees.

    Three loops rather than a branch in one: the masked tiles before the run of fully visible ones, that run, and the
    masked ones behind it. The carry of a branch would be copied for every tile.
    """
    lo, hi, full_lo, full_hi = (x[at] for x in (hulls.lo, hulls.hi, hulls.full_lo, hulls.full_hi))
    full_lo = jnp.clip(full_lo, lo, hi)
    full_hi = jnp.clip(full_hi, full_lo, hi)
    for first, last, masked in ((lo, full_lo, True), (full_lo, full_hi, False), (full_hi, hi, True)):
        carry = jax.lax.fori_loop(first, last, lambda j, c, masked=masked: tile(j, masked, c), carry)
    return carry


def _product(spec: str, a: Array, b: Array) -> Float[Array, "K _ _"]:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _queries(x: Float[Array, "B T N H"], at: tuple[Array, Array], size: int, K: int) -> Float[Array, "K M H"]:
    """A block of queries, the heads that share a key head side by side: one matrix for each key head."""
    N, H = x.shape[2:]
    block = jax.lax.dynamic_slice(x, (at[0], at[1] * size, 0, 0), (1, size, N, H))
    return block.reshape(size, K, N // K, H).transpose(1, 2, 0, 3).reshape(K, -1, H)


def _tokens_first(block: Float[Array, "K M H"], size: int) -> Float[Array, "1 M N H"]:
    """The reverse of ``_queries``."""
    K, _, H = block.shape
    return block.reshape(K, -1, size, H).transpose(2, 0, 1, 3).reshape(1, size, -1, H)


def _put(x: Float[Array, "B T N H"], block: Array, at: tuple[Array, Array], size: int) -> Float[Array, "B T N H"]:
    return jax.lax.dynamic_update_slice(x, block.astype(x.dtype), (at[0], at[1] * size, 0, 0))


def _keys(x: Float[Array, "B K S H"], at: tuple[Array, Array], j: Array, size: int) -> Float[Array, "K size H"]:
    return jax.lax.dynamic_slice(x, (at[0], 0, j * size, 0), (1, x.shape[1], size, x.shape[3]))[0]


def _add(
    x: Float[Array, "B K S H"], block: Array, at: tuple[Array, Array], j: Array, size: int
) -> Float[Array, "B K S H"]:
    new = _keys(x, at, j, size) + block
    return jax.lax.dynamic_update_slice(x, new[None], (at[0], 0, j * size, 0))


def _cut(x: Int[Array, "B T"], at: tuple[Array, Array], size: int) -> Int[Array, "size 1"]:
    return jax.lax.dynamic_slice(x, (at[0], at[1] * size), (1, size))[0][:, None]


def _visible(start: Array, end: Array, size: int, j: Array) -> Bool[Array, "M C"]:
    key = j * size + jnp.arange(size)
    return (start <= key) & (key < end)


def _hide(scores: Float[Array, "K X Y"], sees: Bool[Array, "_ _"]) -> Float[Array, "K X Y"]:
    """Scores of hidden keys; the mask is shared by the heads of a block, which lie side by side on either axis."""
    K, X, Y = scores.shape
    x, y = sees.shape
    return jnp.where(sees[:, None, :], scores.reshape(K, X // x, x, Y // y, y), HIDDEN).reshape(K, X, Y)


def _heads_first(x: Float[Array, "B S K H"]) -> Float[Array, "B K S H"]:
    return x.swapaxes(1, 2)


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
