"""Where activations lie on the mesh in use: few constraints, at the places that XLA cannot guess.

Parameters have their table in ``training/sharding.py``. From those alone XLA may as well split every state by its width
as the kernels are split, and send activations around where it should gather weights.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cocoa_jax.attention.divide import free_axes, row_axes

VOCABULARY = ("fsdp", "tensor")  # the axes that share the parameters share the LM head by its vocabulary


def row_parts(rows: int) -> int:
    """In how many equal parts so many rows lie on the devices of the mesh in use; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in row_axes(rows))


def over_rows(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """``x`` with its rows over the devices and all else whole; as it is where there is no mesh."""
    axes = row_axes(x.shape[0])
    return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x


def over_vocabulary(x: Float[Array, "... V"], *, rows: bool = False) -> Float[Array, "... V"]:
    """``x`` with its last axis over the devices that share the parameters, and all else whole.

    Args:
        rows: whether the first axis lies over what is left of the axes of rows; each of those has other rows.
    """
    free = free_axes()
    axes = tuple(name for name in VOCABULARY if name in free)
    if not axes:
        return x
    return jax.lax.with_sharding_constraint(x, P(_left(x.shape[0]) if rows else None, *[None] * (x.ndim - 2), axes))


def shared_rows(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """``x`` whole on all devices that share the parameters, its rows over the other axes of rows."""
    return jax.lax.with_sharding_constraint(x, P(_left(x.shape[0]))) if free_axes() else x


def look_up(table: Float[Array, "V D"], ids: Int[Array, "B ..."]) -> Float[Array, "B ... D"]:
    """Rows of ``table``, whose gradient is added up where the parts of its width lie.

    Left alone, XLA adds up a whole table on every device and then those of all devices.
    """
    return _look_up(table.shape[0], ids, table)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(rows: int, ids: Int[Array, "B ..."], table: Float[Array, "V D"]) -> Float[Array, "B ... D"]:
    return jnp.take(table, ids, axis=0)


def _looked_up(rows: int, ids: Int[Array, "B ..."], table: Float[Array, "V D"]) -> tuple[Any, Any]:
    return _look_up(rows, ids, table), ids


def _added_up(rows: int, ids: Int[Array, "B ..."], gradient: Float[Array, "B ... D"]) -> tuple[None, Any]:
    total = jnp.zeros((rows, gradient.shape[-1]), gradient.dtype)
    if "fsdp" in free_axes():
        own = P(_left(ids.shape[0]), *[None] * (ids.ndim - 1))
        ids = jax.lax.with_sharding_constraint(ids, own)
        gradient = jax.lax.with_sharding_constraint(gradient, P(*own, "fsdp"))
        total = jax.lax.with_sharding_constraint(total, P(None, "fsdp"))
        return None, jax.lax.with_sharding_constraint(total.at[ids].add(gradient), P(None, "fsdp"))
    return None, total.at[ids].add(gradient)


_look_up.defvjp(_looked_up, _added_up)


def whole(x: Float[Array, ...]) -> Float[Array, ...]:
    """All of ``x`` on every device."""
    return jax.lax.with_sharding_constraint(x, P()) if free_axes() else x


def cut_rows(x: Float[Array, "B ..."], parts: int, rows: int) -> Float[Array, "c n ..."]:
    """[B, ...] as [c, parts * rows, ...]: every chunk has as many rows of each of ``parts`` devices."""
    chunks = x.shape[0] // parts // rows
    return x.reshape(parts, chunks, rows, *x.shape[1:]).swapaxes(0, 1).reshape(chunks, parts * rows, *x.shape[1:])


def row_chunks(own: int, rows: int | None) -> int:
    """In how many chunks of so many rows (None: of all) the ``own`` rows of a device are taken.

    Raises:
        ValueError: the chunks do not divide the rows of a device.
    """
    if rows is None or rows >= own:
        return 1
    if own % rows:
        raise ValueError(f"compute.chunk_rows is {rows}, a device has {own} rows: choose a divisor of them")
    return own // rows


def joined_rows(x: Float[Array, "c n ..."], parts: int, rows: int) -> Float[Array, "B ..."]:
    """The inverse of ``cut_rows``."""
    chunks = x.shape[0]
    return x.reshape(chunks, parts, rows, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _left(rows: int) -> tuple[str, ...]:
    return tuple(name for name in row_axes(rows) if name not in VOCABULARY)
