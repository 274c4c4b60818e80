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
from cocoa_jax.models.spread import cut_rows, joined_rows, over_rows, row_chunks, row_parts, whole
from cocoa_jax.objectives.similarity import Tokens, normalised

Pooling = Literal["bridge", "mean"]
ModelOf = Callable[[Int[Array, ""], int], Qwen2VL]
"""The model for a chunk of rows, by its number and how many there are: what is random in it must differ by row."""


def embed_examples(
    model: Qwen2VL, batch: Mapping[str, Array], pooling: Pooling = "bridge", tokens: Tokens = "concatenated"
) -> Float[Array, "X W"]:
    """Unit-length embeddings of the batch's examples in the batch's order, float32.

    The K bridge tokens of an example are normalised one by one and concatenated, so W = K D and the
    cosine of two embeddings is the mean cosine of their tokens; K = 1 is the paper. Of the mean, over all states or
    over the tokens, W = D.
    """
    slots, _ = _embed_slots(model, Inputs.from_batch(batch), batch["pool"], pooling, tokens)
    return _in_order(slots, batch["example"])


def embed_in_chunks(
    model_of: ModelOf,
    batch: Mapping[str, Array],
    rows: int | None,
    pooling: Pooling = "bridge",
    tokens: Tokens = "concatenated",
    remat: bool = True,
) -> tuple[Float[Array, "X W"], Float[Array, " X"]]:
    """As ``embed_examples``, ``rows`` rows of each device at a time; a loss over all has the gradients of the batch.

    Args:
        remat: whether only the embeddings of a chunk are kept and all else is made again for its gradient, so that
            memory hardly grows with the batch.

    Source: gradient caching, arXiv 2101.06983.

    Returns:
        The embeddings, and how long each was before it was made one of unit length (of several tokens their mean); the
        lengths pass no gradient.
    Raises:
        ValueError: the chunks do not divide the rows of a device.
    """
    (B, _, _), pool = batch["pool"].shape, batch["pool"]
    parts = row_parts(B)
    count = row_chunks(B // parts, rows)
    if rows is None or count == 1:
        found = _embed_slots(model_of(jnp.int32(0), 1), Inputs.from_batch(batch), pool, pooling, tokens)
        return _both_in_order(found, batch["example"])

    def embed(number: Array, inputs: Inputs, pool: Array) -> tuple[Array, Array]:
        inputs, pool = jax.tree.map(over_rows, (inputs, pool))
        return jax.tree.map(over_rows, _embed_slots(model_of(number, count), inputs, pool, pooling, tokens))

    chunks = jax.tree.map(lambda x: cut_rows(x, parts, rows), (Inputs.from_batch(batch), pool))
    numbers = jnp.arange(count)
    one = jax.checkpoint(embed) if remat else embed
    _, found = jax.lax.scan(lambda carry, chunk: (carry, one(*chunk)), None, (numbers, *chunks))
    slots, lengths = (joined_rows(x, parts, rows) for x in found)
    return _both_in_order((slots, lengths), batch["example"])


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
) -> tuple[Float[Array, "B E W"], Float[Array, "B E"]]:
    """The embedding of every slot for an example and its length before; an unused one holds what nobody takes."""
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
    lengths = jax.lax.stop_gradient(jnp.mean(jnp.sqrt(squares).reshape(B, E, K), axis=-1))
    return unit.reshape(B, E, -1), lengths


def _both_in_order(found: tuple[Array, Array], example: Int[Array, " X"]) -> tuple[Array, Array]:
    slots, lengths = found
    return _in_order(slots, example), _in_order(lengths[..., None], example)[:, 0]


def _in_order(slots: Float[Array, "B E W"], example: Int[Array, " X"]) -> Float[Array, "X W"]:
    # Every device compares its share with all of them: they are small, and gathered once.
    return jnp.take(whole(slots.reshape(-1, slots.shape[-1])), example, axis=0)
