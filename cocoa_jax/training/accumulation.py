"""Gradients added up over chunks of a batch: one chunk's activations at a time, the loss and gradients of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cocoa_jax.models.spread import cut_rows, over_rows, row_chunks, row_parts
from cocoa_jax.training.place import GLOBAL
from cocoa_jax.training.state import trained_part
from cocoa_jax.training.step import Loss

Values = tuple[Array, dict[str, Array]]  # a loss and its metrics


def accumulated(loss: Loss, rows: int) -> Loss:
    """``loss`` of a batch, ``rows`` rows of each device at a time; nothing is computed twice.

    It is the sum over chunks of sums that are divided by counts of the whole batch (see ``masked_text_loss``), so that
    it does not matter how the positions that count are spread over chunks. The gradient of a chunk is made at once and
    added to those before: what it takes is the memory of one more set of gradients.

    Args:
        loss: of which value and metrics add up over chunks that hold the ``masked_total`` and ``hidden_total`` of the
            whole batch, the number of the ``chunk`` and how many ``chunks`` there are.

    Raises:
        ValueError: the chunks do not divide the rows of a device.
    """

    def whole(params: Any, batch: Mapping[str, Array], progress: Array) -> Values:
        B = batch["tokens"].shape[0]
        count = row_chunks(B // row_parts(B), rows)
        if count == 1:
            return loss(params, batch, progress)
        shared, chunks = _cut(batch, count, rows)

        def of_chunk(part: Any, chunk: Mapping[str, Array]) -> Values:
            spread = {name: over_rows(x) if x.ndim else x for name, x in chunk.items()}
            return loss({**params, **part}, {**shared, **spread}, progress)

        @jax.custom_vjp
        def total(part: Any) -> Values:
            return _added(lambda chunk: of_chunk(part, chunk), chunks)

        def forward(part: Any) -> tuple[Values, Any]:
            return _added(lambda chunk: jax.value_and_grad(of_chunk, has_aux=True)(part, chunk), chunks)

        def backward(gradients: Any, outer: Values) -> tuple[Any]:
            return (jax.tree.map(lambda gradient: gradient * outer[0], gradients),)

        total.defvjp(forward, backward)
        return total(trained_part(params))

    return whole


def _cut(batch: Mapping[str, Array], chunks: int, rows: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """What all chunks share, and [c, ...] of what each has for itself."""
    B = batch["tokens"].shape[0]
    own = {name: x for name, x in batch.items() if x.ndim and name not in GLOBAL}
    shared = {name: x for name, x in batch.items() if name not in own} | {"chunks": jnp.int32(chunks)}
    for name, chosen in (("masked", batch["predict_id"] >= 0), ("hidden", batch.get("hidden_unit"))):
        if chosen is not None:
            shared[f"{name}_total"] = jnp.sum(chosen)
    cut = {name: cut_rows(x, row_parts(B), rows) for name, x in own.items()}
    return shared, {**cut, "chunk": jnp.arange(chunks)}


def _added(of_chunk: Callable[[Mapping[str, Array]], Any], chunks: Mapping[str, Array]) -> Any:
    """The sum of a function's values over chunks, which run one after the other."""
    one = jax.tree.map(lambda x: x[0], chunks)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_chunk, one))

    def add(sums: Any, chunk: Mapping[str, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of_chunk(chunk)), None

    return jax.lax.scan(add, zeros, chunks)[0]
