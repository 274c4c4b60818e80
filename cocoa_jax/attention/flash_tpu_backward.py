"""The backward TPU kernel: the gradients of queries, keys and values in one visit of each active tile.

The list runs over the queries, as in the forward kernel; the gradients of all keys of a row stay in vector memory until
the row ends. That costs five matrix products a tile, where two kernels, one per order, cost seven.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from cocoa_jax.attention.flash_tpu_forward import HIDDEN, LOG2_E, Call, Ref, product
from cocoa_jax.attention.flash_tpu_tiles import masked, unmasked
from cocoa_jax.attention.tiles import FIRST, LAST


def _kernel(
    call: Call,
    list_ref: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    dout: Ref,
    stats: Ref,
    spans: Ref,
    dq: Ref,
    dk: Ref,
    dv: Ref,
    *scratch: Ref,
) -> None:
    """Scores stand with the keys in rows, so that what belongs to a query (span, log-sum-exp) is a row vector."""
    dq_sum, dk_sum, dv_sum = scratch
    word = list_ref[pl.program_id(1)]
    bq, bk = call.blocks
    here = pl.ds(pl.multiple_of(call.words.key(word) * bk, bk), bk)

    @pl.when(call.words.begins_row(word))
    def _() -> None:
        def clear(at: Ref) -> None:
            dk_sum[at] = dv_sum[at] = jnp.zeros((bk, dk_sum.shape[1]), jnp.float32)

        _over_keys(call, clear)

    @pl.when(word & FIRST != 0)
    def _() -> None:
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)

    def tile(hide: bool) -> None:
        keys, values = k[0, 0], v[0, 0]
        if hide:
            index = lax.broadcasted_iota(jnp.int32, (bk, bq), 0)
            first = call.words.key(word) * bk
            seen = (index >= spans[0, 0:1] - first) & (index < spans[0, 1:2] - first)
        dk_tile = dv_tile = jnp.zeros((bk, keys.shape[1]), jnp.float32)
        for g in range(call.heads):
            queries, doutput = q[0, g], dout[0, g]
            scores = product(keys, queries, (1, 1)) * (call.scale * LOG2_E)
            if hide:
                scores = jnp.where(seen, scores, HIDDEN)
            weights = jnp.exp2(scores - stats[0, 0, g : g + 1])
            dscores = weights * (product(values, doutput, (1, 1)) - stats[0, 0, call.heads + g : call.heads + g + 1])
            weights, dscores = weights.astype(values.dtype), dscores.astype(keys.dtype)
            dv_tile += product(weights, doutput, (1, 0))
            dk_tile += product(dscores, queries, (1, 0))
            dq_sum[g] += product(dscores, keys, (0, 0))
        dk_sum[here] += dk_tile
        dv_sum[here] += dv_tile

    pl.when(masked(word))(lambda: tile(True))
    pl.when(unmasked(word))(lambda: tile(False))

    @pl.when(word & LAST != 0)
    def _() -> None:
        dq[0] = (dq_sum[...] * call.scale).astype(dq.dtype)

    @pl.when(call.words.ends_row(word))
    def _() -> None:
        def write(at: Ref) -> None:
            dk[0, 0, at] = (dk_sum[at] * call.scale).astype(dk.dtype)
            dv[0, 0, at] = dv_sum[at].astype(dv.dtype)

        _over_keys(call, write)


def _over_keys(call: Call, body: Callable[[Ref], None]) -> None:
    """Every block of keys of the row in turn: a loop, because unrolled it would make the program long."""
    bk = call.blocks.key

    def step(j: Array, carry: None) -> None:
        body(pl.ds(pl.multiple_of(j * bk, bk), bk))

    lax.fori_loop(0, call.words.keys, step, None)


def backward(
    call: Call,
    tiles: Int[Array, " W"],
    count: Int[Array, ""],
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    dout: Float[Array, "B N T H"],
    stats: Float[Array, "B G A2 T"],
    spans: Int[Array, "B 2 T"],
    dq_dtype: jnp.dtype,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Gradients of q, k and v; T and S are multiples of the block.

    ``stats`` holds, for each group of A heads, the A log-sum-exps of the forward kernel and then the A sums of output
    times its gradient. Where one tile does not hold all query heads of a key head, the parts are added afterwards.
    """
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    words, heads, (bq, bk) = call.words, call.heads, call.blocks
    groups, per_key = N // heads, N // K // heads

    def at_query(h: Array, i: Array, w: Ref) -> tuple[Array | int, ...]:
        return words.row(w[i]), h, words.query(w[i]), 0

    def at_key(h: Array, i: Array, w: Ref) -> tuple[Array | int, ...]:
        return words.row(w[i]), h // per_key, words.key(w[i]), 0

    def at_row(h: Array, i: Array, w: Ref) -> tuple[Array | int, ...]:
        return words.row(w[i]), h, 0, 0

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=call.grid(groups, count),
        in_specs=[
            pl.BlockSpec((1, heads, bq, H), at_query),
            pl.BlockSpec((1, 1, bk, H), at_key),
            pl.BlockSpec((1, 1, bk, H), at_key),
            pl.BlockSpec((1, heads, bq, H), at_query),
            pl.BlockSpec((1, 1, 2 * heads, bq), lambda h, i, w: (words.row(w[i]), h, 0, words.query(w[i]))),
            pl.BlockSpec((1, 2, bq), lambda h, i, w: (words.row(w[i]), 0, words.query(w[i]))),
        ],
        out_specs=[
            pl.BlockSpec((1, heads, bq, H), at_query),
            pl.BlockSpec((1, 1, S, H), at_row),
            pl.BlockSpec((1, 1, S, H), at_row),
        ],
        scratch_shapes=[
            pltpu.VMEM((heads, bq, H), jnp.float32),
            pltpu.VMEM((S, H), jnp.float32),
            pltpu.VMEM((S, H), jnp.float32),
        ],
    )
    area = call.tiles * N * bq * bk
    key_dtype = k.dtype if per_key == 1 else jnp.float32
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct((B, N, T, H), dq_dtype),
            jax.ShapeDtypeStruct((B, groups, S, H), key_dtype),
            jax.ShapeDtypeStruct((B, groups, S, H), key_dtype),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=call.vmem),
        cost_estimate=pl.CostEstimate(
            flops=10 * area * H,
            transcendentals=area,
            bytes_accessed=(3 * q.size + 2 * call.tiles * groups * bk * H) * q.dtype.itemsize
            + 2 * B * groups * S * H * jnp.dtype(key_dtype).itemsize,
        ),
        interpret=call.interpret,
        name="span_attention_backward",
    )(tiles, q, k, v, dout, stats, spans)
    if per_key > 1:
        dk, dv = (a.reshape(B, K, per_key, S, H).sum(2).astype(k.dtype) for a in (dk, dv))
    return dq, dk, dv
