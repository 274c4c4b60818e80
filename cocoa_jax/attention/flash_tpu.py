"""Attention under spans on TPUs: Pallas kernels that visit only the tiles that somebody sees, O(T) memory.

The active tiles of all rows form one list, built from the spans inside the jitted program, and the grid of a kernel is
as long as the list: what nobody sees costs nothing, and a batch is a longer list, not an outer loop.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from cocoa_jax.attention.flash_tpu_backward import backward
from cocoa_jax.attention.flash_tpu_blocks import Tuning, device, fit, heads_per_tile, tuning
from cocoa_jax.attention.flash_tpu_forward import Call, forward
from cocoa_jax.attention.flash_tpu_tiles import Words, active_tiles, keys_per_call, queries_per_call, stacked
from cocoa_jax.attention.spans import Spans
from cocoa_jax.attention.tiles import Blocks, count_tiles

OUT, LSE = "span_attention_out", "span_attention_lse"  # what a remat policy keeps so that the kernel runs once a pass


class Static(NamedTuple):
    """What is known when the program is traced.

    Args:
        scale: multiplies the scores.
        tuning: block sizes and heads per tile.
        vmem: bytes of vector memory that a kernel may use.
        resident: most keys whose gradients stay in vector memory.
        tiles: active tiles of the forward and backward kernel where they are known.
        interpret: run on the CPU, step by step.
    """

    scale: float
    tuning: Tuning
    vmem: int
    resident: int
    tiles: tuple[int | None, int | None]
    interpret: bool


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spans: Spans,
    scale: float,
    *,
    sizes: Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention under spans by TPU kernels, forward and backward; a query that sees nothing gives zeros.

    In a program for several devices it has to stand in a ``shard_map`` over rows and heads with ``check_vma=False``
    (``divide.divided``): XLA cannot divide a kernel. Under ``jax.vmap`` the new axis joins the rows.

    Args:
        q: queries; N is a multiple of K.
        k: keys, S of them.
        v: values.
        spans: int32 [B, T] each.
        scale: multiplies the scores before the softmax.
        sizes: block sizes; None takes them from the table of the device.
        interpret: run the kernels step by step on any device, for tests.
    """
    spans = spans.within(0, k.shape[1])
    return _attend(_static(q, k, spans, scale, sizes, interpret), q, k, v, jax.tree.map(jnp.asarray, spans))


def _static(q: Array, k: Array, spans: Spans, scale: float, sizes: Tuning | None, interpret: bool) -> Static:
    T, N, H = q.shape[1:]
    S, K = k.shape[1:3]
    kind = _device_kind()
    limits = device(kind)
    if sizes is None:
        sizes = tuning(kind, H, S)
        if q.dtype == jnp.float32:  # a product in float32 is six, and the program that much longer to compile
            sizes = sizes._replace(heads=1)
    sizes = Tuning(fit(sizes.forward, T, S), fit(sizes.backward, T, S), heads_per_tile(N // K, sizes.heads))
    tiles = _known_tiles(spans, S, sizes.forward), _known_tiles(spans, S, sizes.backward)
    return Static(float(scale), sizes, limits.vmem, limits.keys, tiles, interpret)


def _device_kind() -> str:
    """The kind of device that the program is traced for: that of the mesh in use, else the default one."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if described is None else described.device_kind


def _known_tiles(spans: Spans, keys: int, blocks: Blocks) -> int | None:
    """The number of active tiles if the spans are plain numbers now, not yet to be computed."""
    if isinstance(spans.start, jax.core.Tracer) or isinstance(spans.end, jax.core.Tracer):
        return None
    return count_tiles(spans, keys, blocks).visited


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q: Array, k: Array, v: Array, spans: Spans) -> Array:
    return _batched(_forward, static)(q, k, v, spans)[0]


def _attend_forward(static: Static, q: Array, k: Array, v: Array, spans: Spans) -> tuple[Array, tuple[Any, ...]]:
    out, lse = _batched(_forward, static)(q, k, v, spans)
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return out, (q, k, v, spans, out, lse)


def _attend_backward(static: Static, kept: tuple[Any, ...], dout: Array) -> tuple[Any, ...]:
    return *_batched(_backward, static)(*kept, dout), None


_attend.defvjp(_attend_forward, _attend_backward)


def _batched(function: Any, static: Static) -> Any:
    """``function`` of arrays with leading rows; under vmap the new axis joins the rows instead of becoming a loop."""

    @custom_batching.custom_vmap
    def call(*args: Any) -> Any:
        return function(static, *args)

    @call.def_vmap
    def _(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        def join(array: Array, has: bool) -> Array:
            array = array if has else jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        outs = call(*jax.tree.map(join, args, tuple(batched)))
        outs = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), outs)
        return outs, jax.tree.map(lambda _: True, outs)

    return call


def _padded(array: Array, axis: int, block: int) -> Array:
    """Zeros at the end of an axis up to a multiple of the block; an empty span for spans, which are zero too."""
    missing = -array.shape[axis] % block
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths) if missing else array


def _heads_first(array: Array, block: int) -> Array:
    """[B, T, N, H] to [B, N, T', H], T' a multiple of the block."""
    return _padded(array.swapaxes(1, 2), 2, block)


def _call(static: Static, blocks: Blocks, spans: Spans, keys: int, tiles: int | None) -> tuple[Call, Array, Array]:
    """What the kernels need of the spans: the static part, the list of active tiles and its length."""
    words = Words(spans.start.shape[0], *blocks.grid(spans.start.shape[1], keys))
    call = Call(blocks, static.tuning.heads, words, static.scale, static.vmem, static.interpret, tiles or words.bound)
    return call, *active_tiles(spans, keys, blocks, words)


def _forward(static: Static, q: Array, k: Array, v: Array, spans: Spans) -> tuple[Array, Array]:
    """Output [B, T, N, H] and log-sum-exp [B, N, T]; long rows in parts, so that the list of tiles stays small."""
    (B, T, N, _), S = q.shape, k.shape[1]
    blocks = static.tuning.forward
    part = queries_per_call(B, T, S, blocks)
    keys, values = _heads_first(k, blocks.key), _heads_first(v, blocks.key)
    outs, sums = [], []
    for at in range(0, T, part):
        to = min(at + part, T)
        own = Spans(spans.start[:, at:to], spans.end[:, at:to])
        call, tiles, count = _call(static, blocks, own, S, static.tiles[0])
        queries, bounds = _heads_first(q[:, at:to], blocks.query), _padded(stacked(own), 2, blocks.query)
        out, lse = forward(call, tiles, count, queries, keys, values, bounds)
        outs.append(out[:, :, : to - at].swapaxes(1, 2))
        sums.append(lse.reshape(B, N, -1)[:, :, : to - at])
    return _joined(outs, 1), _joined(sums, 2)


def _backward(
    static: Static, q: Array, k: Array, v: Array, spans: Spans, out: Array, lse: Array, dout: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v; rows with many keys in parts, so that what stays in vector memory and the list fit."""
    (B, T, N, _), S = q.shape, k.shape[1]
    blocks, heads = static.tuning.backward, static.tuning.heads
    part = keys_per_call(B, T, S, blocks, static.resident)
    product = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), dout.astype(jnp.float32))
    stats = jnp.concatenate([a.reshape(B, N // heads, heads, T) for a in (lse, product)], axis=2)
    stats = _padded(stats, 3, blocks.query)
    queries, gradient = _heads_first(q, blocks.query), _heads_first(dout, blocks.query)
    dq: Any = 0
    dks, dvs = [], []
    for at in range(0, S, part):
        to = min(at + part, S)
        own = spans.within(at, to)
        call, tiles, count = _call(static, blocks, own, to - at, static.tiles[1])
        keys, values = (_heads_first(a[:, at:to], blocks.key) for a in (k, v))
        bounds = _padded(stacked(own), 2, blocks.query)
        kind = q.dtype if (at, to) == (0, S) else jnp.float32  # parts are added in float32
        some, dk, dv = backward(call, tiles, count, queries, keys, values, gradient, stats, bounds, kind)
        dq = some if (at, to) == (0, S) else dq + some
        dks.append(dk[:, :, : to - at].swapaxes(1, 2))
        dvs.append(dv[:, :, : to - at].swapaxes(1, 2))
    return dq[:, :, :T].swapaxes(1, 2).astype(q.dtype), _joined(dks, 1), _joined(dvs, 1)


def _joined(arrays: list[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)
