"""Cross-entropy at the chosen positions, the part that stages 1 and 2 share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cocoa_jax.models.qwen2_vl import Qwen2VL
from cocoa_jax.models.spread import over_rows, over_vocabulary, row_parts, shared_rows


@jax.named_scope("loss")
def masked_text_loss(
    model: Qwen2VL,
    hidden: Float[Array, "B T D"],
    predict_at: Int[Array, "B M"],
    predict_id: Int[Array, "B M"],
    chunk_tokens: int | None = None,
    total: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy over the chosen positions of the whole batch, and the share guessed right.

    Only the chosen states meet the LM head, ``chunk_tokens`` of each device at a time, and a device makes the scores of
    its part of the vocabulary: there is no [B, T, V] tensor, nor a [B, M, V] one.

    Args:
        hidden: states after the final norm.
        predict_at: the column whose state predicts; -1 where the budget M is not used up.
        predict_id: the true id there, -1 where unused.
        chunk_tokens: None for all of them at once.
        total: chosen positions of the batch that these rows are a chunk of, by which their sums are divided, so that
            the chunks' losses and metrics add up to those of the batch; None where the rows are all of it.
    """
    B, M = predict_id.shape
    columns = M if chunk_tokens is None else min(M, max(1, chunk_tokens * row_parts(B) // B))
    chosen = over_rows(jnp.take_along_axis(hidden, jnp.maximum(predict_at, 0)[..., None], axis=1))
    kernel = over_vocabulary(model.head_kernel())

    def sums(states: Float[Array, "B m D"], ids: Int[Array, "B m"]) -> tuple[Array, Array]:
        return _sums(over_vocabulary(model.logits(shared_rows(states), kernel), rows=True), ids)

    if columns == M:
        losses, right = sums(chosen, predict_id)
    else:
        chunks = _chunks(chosen, columns, 0), _chunks(predict_id, columns, -1)
        # What one chunk computed is not kept for the backward pass: it would add up to all scores again.
        _, parts = jax.lax.scan(lambda carry, chunk: (carry, jax.checkpoint(sums)(*chunk)), None, chunks)
        losses, right = (jnp.sum(part) for part in parts)
    own = jnp.sum(predict_id >= 0)
    count = jnp.maximum(own if total is None else total, 1)
    return losses / count, {"masked_accuracy": right / count, "masked_tokens": own.astype(jnp.float32)}


def _chunks(x: Array, columns: int, filling: int) -> Array:
    """[B, M, ...] as [c, B, columns, ...]; the last chunk is filled up."""
    B, M = x.shape[:2]
    padded = jnp.pad(x, [(0, 0), (0, -M % columns), *[(0, 0)] * (x.ndim - 2)], constant_values=filling)
    return jnp.moveaxis(padded.reshape(B, -1, columns, *x.shape[2:]), 1, 0)


def _sums(scores: Float[Array, "B m V"], ids: Int[Array, "B m"]) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Cross-entropies and right guesses, added up over the used positions (ids from 0).

    By comparison with every id, as the devices that share the vocabulary can do it alone; a tie with the true id is no
    right guess.
    """
    own = jnp.arange(scores.shape[-1]) == ids[..., None]
    true = jnp.sum(jnp.where(own, scores, 0.0), axis=-1)
    losses = jax.nn.logsumexp(scores, axis=-1) - true
    best_other = jnp.max(jnp.where(own, -jnp.inf, jax.lax.stop_gradient(scores)), axis=-1)
    used = ids >= 0
    return jnp.sum(jnp.where(used, losses, 0.0)), jnp.sum(used & (true > best_other))
