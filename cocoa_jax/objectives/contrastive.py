"""Stage 3: contrastive learning on the embedding at the bridge token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cocoa_jax.models.spread import over_rows
from cocoa_jax.objectives.embedding import ModelOf, Pooling, embed_in_chunks
from cocoa_jax.objectives.similarity import Tokens, max_similarity, truncated

NEVER = -1e30  # a score that no softmax sees; finite, so that its gradient is zero and not NaN


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """InfoNCE, and what an embedding is.

    Args:
        temperature: divides the cosines.
        first_temperature: where a run begins (ours); it falls to ``temperature`` geometrically. A model from scratch
            needs it: while its embeddings say nothing, a small temperature rewards making them all alike.
        symmetric: adds the target -> query direction (ours).
        pooling: what is embedded: the states of the ``bridge`` tokens, or the ``mean`` of an example's states (as in
            MoCa's paper).
        tokens: what becomes of several bridge tokens, see ``similarity.Tokens``.
        widths: numbers a token of shorter embeddings, each with a loss of its own beside that of the whole (ours).
        hardness: beta of weights exp(beta cosine) on negatives, of mean 1 for every query; 0 weighs all alike. Source:
            arXiv 2010.04592.
        false_negatives: whether pairs that show the same thing stay each other's negatives, as published code has it.
    """

    temperature: float = 0.02
    first_temperature: float | None = None
    symmetric: bool = False
    pooling: Pooling = "bridge"
    tokens: Tokens = "concatenated"
    widths: tuple[int, ...] = ()
    hardness: float = 0.0
    false_negatives: bool = False

    def __post_init__(self) -> None:
        if self.hardness < 0 or any(width < 1 for width in self.widths):
            raise ValueError(f"contrastive: hardness {self.hardness} and widths {self.widths} start at 0 and 1")
        for name, value in (("temperature", self.temperature), ("first_temperature", self.first_temperature)):
            if value is not None and value <= 0:
                raise ValueError(f"contrastive.{name} is {value}: it must be positive")

    def at(self, progress: Float[Array, ""] | float) -> Float[Array, ""] | float:
        """The temperature when this share of the run, 0 to 1, is done."""
        if self.first_temperature is None:
            return self.temperature
        return self.first_temperature ** (1 - progress) * self.temperature**progress


@jax.named_scope("stage3")
def contrastive_loss(
    model_of: ModelOf,
    batch: Mapping[str, Array],
    config: ContrastiveConfig,
    progress: Float[Array, ""] | float = 1.0,
    chunk_rows: int | None = None,
    chunk_remat: bool = True,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """InfoNCE over the whole global batch, when ``progress`` of the run (0 to 1) is done.

    Args:
        chunk_rows: rows that each device encodes at a time; None for all.
        chunk_remat: whether each such chunk is computed again for its gradient.

    Source: CoCoA, arXiv 2603.01471, stage 3.
    """
    N = batch["target_key"].shape[0]
    embeddings, lengths = embed_in_chunks(model_of, batch, chunk_rows, config.pooling, config.tokens, chunk_remat)
    kept = tokens_of(config.pooling, config.tokens, batch["pool"].shape[2])
    more = progress, batch.get("image_key"), batch.get("negative_key"), kept
    loss, metrics = info_nce(embeddings[:N], embeddings[N:], batch["target_key"], config, *more)
    metrics["embedding_norm"] = jnp.mean(lengths, where=batch["example"] >= 0)
    if not config.widths:
        return loss, metrics
    losses = {}
    for width in config.widths:
        short = truncated(embeddings, width, kept)
        losses[f"contrastive_{width}"] = info_nce(short[:N], short[N:], batch["target_key"], config, *more)[0]
    mean = (loss + sum(losses.values())) / (1 + len(losses))
    return mean, {**metrics, **losses}


def tokens_of(pooling: Pooling, tokens: Tokens, bridge_tokens: int) -> int:
    """How many tokens stand side by side in an embedding."""
    return 1 if pooling == "mean" or tokens == "mean" else bridge_tokens


def info_nce(
    queries: Float[Array, "N W"],
    targets: Float[Array, "S W"],
    target_key: Int[Array, " N"],
    config: ContrastiveConfig,
    progress: Float[Array, ""] | float = 1.0,
    image_key: Int[Array, " N"] | None = None,
    negative_key: Int[Array, " R"] | None = None,
    tokens: int = 1,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean of -log softmax of each query's own target among all targets and hard negatives.

    Args:
        queries: unit length.
        targets: unit length; the first N belong to the queries in order, the rest are hard negatives.
        target_key: two targets of equal key show the same thing and are no negatives of each other.
        progress: the share of the run that is done, which sets the temperature.
        image_key: nor are the targets of two queries of equal key from 0, which show the same pictures.
        negative_key: a hard negative of equal key to a target is no negative of its query; one below 0 is not there,
            and no negative of any; R = S - N.
        tokens: how many stand side by side in a row, for ``max_sim``.
    """
    N, S = queries.shape[0], targets.shape[0]
    queries = over_rows(queries)
    apart = config.tokens == "max_sim" and tokens > 1
    cosines = max_similarity(queries, targets, tokens) if apart else queries @ targets.T
    same = target_key[:, None] == target_key[None, :]
    if image_key is not None:
        same |= (image_key[:, None] == image_key[None, :]) & (image_key[:, None] >= 0)
    same &= ~jnp.eye(N, dtype=bool)
    if negative_key is None:
        excluded = jnp.pad(same, ((0, 0), (0, S - N)))
    else:
        excluded = jnp.concatenate([same, target_key[:, None] == negative_key[None, :]], axis=1)
    if config.false_negatives:
        excluded = jnp.zeros_like(excluded)
    if negative_key is not None:
        excluded |= jnp.pad(negative_key < 0, (N, 0))
    scores = jnp.where(excluded, NEVER, cosines / config.at(progress))
    own = _diagonal(scores)
    negative = ~(excluded | jnp.eye(N, S, dtype=bool))
    loss = jnp.mean(jax.nn.logsumexp(_weighted(scores, cosines, negative, config.hardness, 1), axis=1) - own)
    if config.symmetric:
        back = _weighted(scores[:, :N], cosines[:, :N], negative[:, :N], config.hardness, 0)
        loss = (loss + jnp.mean(jax.nn.logsumexp(back, axis=0) - own)) / 2
    others = jnp.where(excluded | jnp.eye(N, S, dtype=bool), -1.0, cosines)
    hardest = jnp.max(others, axis=1)
    positive = _diagonal(cosines)
    return loss, {
        "contrastive": loss,
        "batch_accuracy": jnp.mean(positive > hardest),
        "positive_cosine": jnp.mean(positive),
        "hardest_cosine": jnp.mean(hardest),
        "uniformity": uniformity(jax.lax.stop_gradient(cosines), negative),
    }


def uniformity(cosines: Float[Array, "N S"], pairs: Bool[Array, "N S"]) -> Float[Array, ""]:
    """Log of the mean of exp(-2 d^2) over pairs of rows of unit length, whose squared distance is 2 - 2 cosine.

    From 0, all alike, down to -4 for rows at right angles on the mean, and to -8. The pairs are those that the loss has
    the scores of, a query and the target of another; one that shows the same thing is none.
    Source: Wang and Isola, arXiv 2005.10242, equation 2.
    """
    exponents = jnp.where(pairs, 4 * cosines - 4, NEVER)
    return jax.nn.logsumexp(exponents) - jnp.log(jnp.maximum(jnp.sum(pairs), 1))


def _diagonal(scores: Float[Array, "N S"]) -> Float[Array, " N"]:
    """By comparison of indices, which devices with a share of the rows can do alone."""
    return jnp.sum(jnp.where(jnp.eye(scores.shape[0], scores.shape[1], dtype=bool), scores, 0.0), axis=1)


def _weighted(
    scores: Float[Array, "N S"], cosines: Float[Array, "N S"], negative: Bool[Array, "N S"], hardness: float, axis: int
) -> Float[Array, "N S"]:
    """Scores with the log of each negative's weight added; weights have the mean 1 along the axis and no gradient."""
    if not hardness:
        return scores
    steep = hardness * jax.lax.stop_gradient(cosines)
    count = jnp.maximum(jnp.sum(negative, axis=axis, keepdims=True), 1)
    mean = jax.nn.logsumexp(jnp.where(negative, steep, NEVER), axis=axis, keepdims=True) - jnp.log(count)
    return jnp.where(negative, scores + steep - mean, scores)
