"""What an embedding is: states of the bridge tokens, or their mean, taken from rows and put into the batch's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cocoa_jax.attention.spans import Spans
from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.qwen2_vl import Qwen2VL
from cocoa_jax.models.spread import over_rows, row_parts, whole
from cocoa_jax.objectives.similarity import Tokens, normalised

Pooling = Literal["bridge", "mean"]
ModelOf = Callable[[Int[Array, ""]], Qwen2VL]
"""The model for a chunk of rows, by its number: what is random in it must differ from chunk to chunk."""


def embed_examples(
    model: Qwen2VL, batch: Mapping[str, Array], pooling: Pooling = "bridge", tokens: Tokens = "concatenated"
) -> Float[Array, "X W"]:
    """Unit-length embeddings of the batch's examples in the batch's order, float32.

    The K bridge tokens of an example are normalised one by one and concatenated, so W = K D and the
    cosine of two embeddings is the mean cosine of their tokens; K = 1 is the paper. Of the mean, over all states or
    over the tokens, W = D.
    """
    return _in_order(_embed_slots(model, Inputs.from_batch(batch), batch["pool"], pooling, tokens), batch["example"])


def embed_in_chunks(
    model_of: ModelOf,
    batch: Mapping[str, Array],
    rows: int | None,
    pooling: Pooling = "bridge",
    tokens: Tokens = "concatenated",
) -> Float[Array, "X W"]:
    """As ``embed_examples``, ``rows`` rows of each device at a time; their activations are not kept but made again.

    Of a chunk only its embeddings are kept, so that memory hardly grows with the batch, and a loss over all of them
    has the gradients of the whole batch.
    Source: gradient caching, arXiv 2101.06983.

    Raises:
        ValueError: the chunks do not divide the rows of a device.
    """
    (B, _, _), pool = batch["pool"].shape, batch["pool"]
    parts = row_parts(B)
    own = B // parts
    if rows is None or rows >= own:
        return embed_examples(model_of(jnp.int32(0)), batch, pooling, tokens)
    if own % rows:
        raise ValueError(f"compute.chunk_rows is {rows}, a device has {own} rows: choose a divisor of them")

    @jax.checkpoint
    def embed(number: Array, inputs: Inputs, pool: Array) -> Array:
        inputs, pool = jax.tree.map(over_rows, (inputs, pool))
        return over_rows(_embed_slots(model_of(number), inputs, pool, pooling, tokens))

    chunks = jax.tree.map(lambda x: _cut(x, parts, rows), (Inputs.from_batch(batch), pool))
    numbers = jnp.arange(own // rows)
    _, slots = jax.lax.scan(lambda carry, chunk: (carry, embed(*chunk)), None, (numbers, *chunks))
    return _in_order(_joined(slots, parts, rows), batch["example"])


def mean_states(hidden: Float[Array, "B T D"], pool: Int[Array, "B E K"], spans: Spans) -> Float[Array, "B E D"]:
    """The mean over all tokens of each example; zero for an unused slot.

    The last bridge token ends its example and sees all of it, in either direction: its span is the example.
    """
    last = pool[..., -1]
    column = jnp.maximum(last, 0)
    start, end = (jnp.take_along_axis(edge, column, axis=1) for edge in (spans.start, spans.end))
    t = jnp.arange(hidden.shape[1])
    inside = (start[..., None] <= t) & (t < end[..., None]) & (last >= 0)[..., None]
    length = jnp.maximum(inside.sum(axis=-1, keepdims=True), 1)
    return jnp.einsum("BET,BTD->BED", inside.astype(hidden.dtype), hidden) / length


def _embed_slots(
    model: Qwen2VL, inputs: Inputs, pool: Int[Array, "B E K"], pooling: Pooling, tokens: Tokens
) -> Float[Array, "B E W"]:
    """The embedding of every slot for an example; one that is not used holds something that nobody takes."""
    hidden, (B, E, K) = model(inputs), pool.shape
    precision = jnp.promote_types(hidden.dtype, jnp.float32)
    if pooling == "mean":
        pooled, K = mean_states(hidden.astype(precision), pool, inputs.spans), 1
    else:
        columns = jnp.maximum(pool.reshape(B, E * K), 0)
        pooled = jnp.take_along_axis(hidden, columns[..., None], axis=1).astype(precision)
    squares = jnp.sum(jnp.square(pooled), axis=-1, keepdims=True)
    # The guard keeps the zero state of an unused slot finite.
    unit = pooled * jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) / K**0.5
    if tokens == "mean":
        unit = normalised(jnp.sum(unit.reshape(B, E, K, -1), axis=2))
    return unit.reshape(B, E, -1)


def _in_order(slots: Float[Array, "B E W"], example: Int[Array, " X"]) -> Float[Array, "X W"]:
    # Every device compares its share with all of them: they are small, and gathered once.
    return jnp.take(whole(slots.reshape(-1, slots.shape[-1])), example, axis=0)


def _cut(x: Array, parts: int, rows: int) -> Array:
    """[B, ...] as [c, parts * rows, ...]: every chunk has as many rows of each of ``parts`` devices."""
    chunks = x.shape[0] // parts // rows
    return x.reshape(parts, chunks, rows, *x.shape[1:]).swapaxes(0, 1).reshape(chunks, parts * rows, *x.shape[1:])


def _joined(x: Array, parts: int, rows: int) -> Array:
    """The inverse of ``_cut``."""
    chunks = x.shape[0]
    return x.reshape(chunks, parts, rows, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
