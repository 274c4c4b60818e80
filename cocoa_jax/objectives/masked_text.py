"""Cross-entropy at the chosen positions, the part that stages 1 and 2 share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cocoa_jax.models.qwen2_vl import Qwen2VL


@jax.named_scope("loss")
def masked_text_loss(
    model: Qwen2VL,
    hidden: Float[Array, "B T D"],
    predict_at: Int[Array, "B M"],
    predict_id: Int[Array, "B M"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy over the chosen positions of the whole batch, and the share guessed right.

    Only the chosen states meet the LM head: no [B, T, V] tensor is made.

    Args:
        hidden: states after the final norm.
        predict_at: the column whose state predicts; -1 where the budget M is not used up.
        predict_id: the true id there, -1 where unused.
    """
    chosen = jnp.take_along_axis(hidden, jnp.maximum(predict_at, 0)[..., None], axis=1)
    scores = model.logits(chosen)
    used = predict_id >= 0
    true = jnp.take_along_axis(scores, jnp.maximum(predict_id, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(scores, axis=-1) - true
    count = jnp.maximum(jnp.sum(used), 1)
    loss = jnp.sum(jnp.where(used, losses, 0.0)) / count
    right = jnp.sum(used & (jnp.argmax(scores, axis=-1) == predict_id)) / count
    return loss, {"masked_accuracy": right, "masked_tokens": count.astype(jnp.float32)}
