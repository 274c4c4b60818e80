"""Dense attention under spans: obviously right, O(T S) memory, the oracle of every other implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cocoa_jax.attention.spans import Spans


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spans: Spans,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention in float32 over the keys that each query sees; a query that sees nothing gives zeros."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    spans = spans.within(0, S)  # an interval beyond the keys sees nothing
    # Heads before tokens, and the queries of one key head side by side: one plain batch of products.
    queries = q.swapaxes(1, 2).reshape(B, K, N // K * T, H)
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.matmul(queries, keys.swapaxes(2, 3), preferred_element_type=jnp.float32) * scale
    hidden = jnp.where(spans.as_mask(S), 0.0, -1e30)[:, None]  # finite: a row of -inf would be NaN
    weights = jax.nn.softmax(scores.reshape(B, N, T, S) + hidden, axis=-1).astype(v.dtype)
    out = jnp.matmul(weights.reshape(B, K, N // K * T, S), values).reshape(B, N, T, H).swapaxes(1, 2)
    sees = (spans.end > spans.start)[..., None, None]
    return jnp.where(sees, out, 0.0).astype(v.dtype)
