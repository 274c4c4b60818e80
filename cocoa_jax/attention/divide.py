"""Rows and heads over the devices of the mesh in use: XLA cannot divide a loop over tiles, nor a kernel, by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from cocoa_jax.attention.spans import Spans

ROWS, HEADS = ("slice", "data", "fsdp"), "tensor"  # mesh axes over which the rows of a batch and the heads are spread
Attend = Callable[[Array, Array, Array, Spans, float], Array]


def free_axes() -> tuple[str, ...]:
    """Axes of more than one device of the mesh in use that no ``shard_map`` around the caller has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1)


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes over which so many rows are spread: all that are there of ``ROWS``, or none if they do not divide."""
    mesh, free = jax.sharding.get_abstract_mesh(), free_axes()
    axes = tuple(name for name in ROWS if name in free)
    return () if rows % math.prod(mesh.shape[name] for name in axes) else axes


def own_heads(heads: int, key_heads: int, parts: int) -> tuple[int, int]:
    """Query and key heads of each of so many devices; all of them where they cannot be divided.

    Key heads fewer than the devices are whole on every one, which takes the one that its query heads share.
    """
    if heads % parts or (key_heads % parts and parts % key_heads):
        return heads, key_heads
    return heads // parts, max(key_heads // parts, 1)


def divided(attend: Attend) -> Attend:
    """``attend`` on every device's own rows and heads, where a mesh is in use (``jax.set_mesh``).

    Axes that the caller's own ``shard_map`` already took are left alone. An axis that does not divide the rows or the
    query heads is not used: its devices do the same work. See ``own_heads`` for the rest.
    """

    def call(q: Array, k: Array, v: Array, spans: Spans, scale: float) -> Array:
        mesh, free, rows = jax.sharding.get_abstract_mesh(), free_axes(), row_axes(q.shape[0])
        N, K = q.shape[2], k.shape[2]
        parts = mesh.shape[HEADS] if HEADS in free else 1
        heads = HEADS if own_heads(N, K, parts)[0] < N else None
        if math.prod(mesh.shape[name] for name in rows) == 1 and heads is None:
            return attend(q, k, v, spans, scale)
        whole = heads is not None and K % parts != 0

        def own(q: Array, k: Array, v: Array, spans: Spans) -> Array:
            if whole:
                first = jax.lax.axis_index(HEADS) * K // parts
                k, v = (jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k, v))
            return attend(q, k, v, spans, scale)

        queries, keys = P(rows, None, heads), P(rows, None, None if whole else heads)
        # Unchecked: a Pallas call does not say over which axes its output varies.
        over = jax.shard_map(
            own, mesh=mesh, in_specs=(queries, keys, keys, P(rows)), out_specs=queries, check_vma=False
        )
        return over(q, k, v, spans)

    return call
