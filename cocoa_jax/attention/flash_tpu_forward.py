"""The forward TPU kernel: one grid step per active tile, several query heads that share a key head at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from cocoa_jax.attention.flash_tpu_tiles import Words, masked, unmasked
from cocoa_jax.attention.tiles import FIRST, LAST, Blocks

LOG2_E = 1.4426950408889634
LANES = 128
ROWS = 32  # queries that are finished at once: few enough to stay in registers
HIDDEN = -3e38  # a score that nobody sees
LOWEST = -1e37  # where the running maximum starts: above HIDDEN, so that a hidden score weighs 0 from the first tile on

Ref = Any


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one call of a kernel.

    Args:
        blocks: the size of a tile.
        heads: query heads per tile; divides N / K.
        words: how the tiles are packed.
        scale: multiplies the scores.
        vmem: bytes of vector memory that the kernel may use.
        interpret: run on the CPU, step by step.
        tiles: active tiles of all rows where the caller knows them, else the most there can be; for cost estimates.
    """

    blocks: Blocks
    heads: int
    words: Words
    scale: float
    vmem: int
    interpret: bool
    tiles: int

    def grid(self, groups: int, count: Int[Array, ""]) -> tuple[Any, ...]:
        """Head groups by active tiles; the interpreter takes no bound that is only known at run time."""
        return groups, (self.words.bound if self.interpret else count)


def product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """A matrix product in float32 over axis ``over[0]`` of ``a`` and ``over[1]`` of ``b``; exact for float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision, preferred_element_type=jnp.float32)


def _widen(column: Array, width: int) -> Array:
    """[bq, 128] of equal lanes to [bq, width]."""
    if width <= LANES:
        return column[:, :width]
    return jnp.concatenate([column] * (width // LANES), axis=1)


def _kernel(call: Call, list_ref: Ref, q: Ref, k: Ref, v: Ref, spans: Ref, out: Ref, lse: Ref, *scratch: Ref) -> None:
    """Scratch: of each head the running maximum, the running sum lane by lane, and the output; then
    start and end of each query as columns, and the mask of the tile."""
    top, total, acc, start, end, hidden = scratch
    word = list_ref[pl.program_id(1)]
    bq, bk = call.blocks

    @pl.when(call.words.begins_row(word))
    def _() -> None:  # within a row the last tile of a block resets the maximum, which makes the rest count for nothing
        top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(word & FIRST != 0)
    def _() -> None:
        for i, column in enumerate((start, end)):
            column[...] = jnp.broadcast_to(spans[0, i : i + 1], (LANES, bq)).T

    def tile(hide: bool) -> None:
        keys, values = k[0, 0], v[0, 0]
        for g in range(call.heads):
            # The scale goes onto the float32 scores: onto a bfloat16 query it would round, and the units are idle.
            scores = product(q[0, g], keys, (1, 1)) * (call.scale * LOG2_E)
            if hide:
                scores = scores + hidden[...]
            before = top[g]
            now = jnp.maximum(before, scores.max(1, keepdims=True))
            weights = jnp.exp2(scores - _widen(now, bk))
            decay = jnp.exp2(before - now)
            top[g] = now
            total[g] = decay * total[g] + sum(weights[:, j : j + LANES] for j in range(0, bk, LANES))
            acc[g] = acc[g] * _widen(decay, acc.shape[-1]) + product(weights.astype(values.dtype), values, (1, 0))

    @pl.when(masked(word))
    def _() -> None:
        first = call.words.key(word) * bk
        index = lax.broadcasted_iota(jnp.int32, (bq, bk), 1)
        seen = (index >= _widen(start[...] - first, bk)) & (index < _widen(end[...] - first, bk))
        hidden[...] = jnp.where(seen, 0, HIDDEN)  # made once for all heads: adding it is cheaper than choosing
        tile(True)

    pl.when(unmasked(word))(lambda: tile(False))
    pl.when(word & LAST != 0)(lambda: _finish(call, out, lse, top, total, acc))


def _finish(call: Call, out: Ref, lse: Ref, top: Ref, total: Ref, acc: Ref) -> None:
    """Normalise, write, and put the log-sum-exps of all heads side by side so that one transpose serves them."""
    bq = call.blocks.query
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    for at in range(0, bq, ROWS):
        rows = pl.ds(at, ROWS)
        tops, sums = jnp.zeros((ROWS, LANES), jnp.float32), jnp.ones((ROWS, LANES), jnp.float32)
        for g in range(call.heads):
            whole = jnp.broadcast_to(total[g, rows].sum(1, keepdims=True), (ROWS, LANES))
            if out.dtype == jnp.float32:
                inverse = 1 / whole
            else:  # one Newton step makes the fast reciprocal as good as float32
                inverse = pl.reciprocal(whole, approx=True)
                inverse = inverse * (2 - whole * inverse)
            sees = top[g, rows] > LOWEST
            out[0, g, rows] = (acc[g, rows] * _widen(jnp.where(sees, inverse, 0), acc.shape[-1])).astype(out.dtype)
            here = (lane == g) & sees
            tops, sums = jnp.where(here, top[g, rows], tops), jnp.where(here, whole, sums)
            top[g, rows] = jnp.full((ROWS, LANES), LOWEST, jnp.float32)
        top[0, rows] = tops + jnp.log2(sums)
    lse[0, 0] = top[0].T[: call.heads]
    top[0] = jnp.full((bq, LANES), LOWEST, jnp.float32)


def forward(
    call: Call,
    tiles: Int[Array, " W"],
    count: Int[Array, ""],
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    spans: Int[Array, "B 2 T"],
) -> tuple[Float[Array, "B N T H"], Float[Array, "B G A T"]]:
    """Output, and the base-2 logarithm of each query's sum of weights (0 where it sees nothing).

    T and S are multiples of the block; N query heads are G groups of A.
    """
    B, N, T, H = q.shape
    K = k.shape[1]
    words, heads, (bq, bk) = call.words, call.heads, call.blocks
    per_key = N // K // heads

    def at_query(h: Array, i: Array, w: Ref) -> tuple[Array | int, ...]:
        return words.row(w[i]), h, words.query(w[i]), 0

    def at_key(h: Array, i: Array, w: Ref) -> tuple[Array | int, ...]:
        return words.row(w[i]), h // per_key, words.key(w[i]), 0

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=call.grid(N // heads, count),
        in_specs=[
            pl.BlockSpec((1, heads, bq, H), at_query),
            pl.BlockSpec((1, 1, bk, H), at_key),
            pl.BlockSpec((1, 1, bk, H), at_key),
            pl.BlockSpec((1, 2, bq), lambda h, i, w: (words.row(w[i]), 0, words.query(w[i]))),
        ],
        out_specs=[
            pl.BlockSpec((1, heads, bq, H), at_query),
            pl.BlockSpec((1, 1, heads, bq), lambda h, i, w: (words.row(w[i]), h, 0, words.query(w[i]))),
        ],
        scratch_shapes=[
            *(pltpu.VMEM((heads, bq, width), jnp.float32) for width in (LANES, LANES, H)),
            *(pltpu.VMEM((bq, LANES), jnp.int32) for _ in range(2)),
            pltpu.VMEM((bq, bk), jnp.float32),
        ],
    )
    area = call.tiles * N * bq * bk
    out, lse = pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct((B, N, T, H), q.dtype),
            jax.ShapeDtypeStruct((B, N // heads, heads, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=call.vmem),
        cost_estimate=pl.CostEstimate(
            flops=4 * area * H,
            transcendentals=area,
            bytes_accessed=(2 * q.size + 2 * call.tiles * N // heads * bk * H) * q.dtype.itemsize,
        ),
        interpret=call.interpret,
        name="span_attention_forward",
    )(tiles, q, k, v, spans)
    return out, lse
