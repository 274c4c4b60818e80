"""How near two embeddings of K bridge tokens are, and shorter embeddings; beyond the paper, where K is 1."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tokens = Literal["concatenated", "mean", "max_sim"]
"""What becomes of the K tokens of an embedding, each of unit length: ``concatenated``, so that a cosine is the mean
over tokens of the same place; their ``mean``, normalised again; ``max_sim``, kept apart: each token of a query with the
nearest of a target, the mean over them (ColBERT, arXiv 2004.12832)."""


def max_similarity(queries: Float[Array, "N W"], targets: Float[Array, "S W"], tokens: int) -> Float[Array, "N S"]:
    """The mean over the query's tokens of the cosine with the nearest token of the target.

    Args:
        queries, targets: rows of unit length, each ``tokens`` tokens of equal length side by side.
    """
    q, t = (rows.reshape(len(rows), tokens, -1) for rows in (queries, targets))
    return jnp.sum(jnp.max(jnp.einsum("NKD,SLD->NKSL", q, t), axis=-1), axis=1)


def truncated(rows: Float[Array, "*n W"], width: int, tokens: int) -> Float[Array, "*n w"]:
    """The first ``width`` numbers of each token, of unit length again (Matryoshka, arXiv 2205.13147).

    Raises:
        ValueError: the tokens are no longer than that.
    """
    parts = rows.reshape(*rows.shape[:-1], tokens, -1)
    if not 0 < width <= parts.shape[-1]:
        raise ValueError(f"width is {width}: an embedding has {parts.shape[-1]} numbers a token, choose from 1 to that")
    return (normalised(parts[..., :width]) / tokens**0.5).reshape(*rows.shape[:-1], -1)


def normalised(rows: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Rows of unit length; a row of zeros stays zero and passes no NaN."""
    squares = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
