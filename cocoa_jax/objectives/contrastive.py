"""Stage 3: contrastive learning on the embedding at the bridge token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.qwen2_vl import Qwen2VL
from cocoa_jax.models.spread import over_rows, row_parts, whole

ModelOf = Callable[[Int[Array, ""]], Qwen2VL]
"""The model for a chunk of rows, by its number: what is random in it must differ from chunk to chunk."""
NEVER = -1e30  # a score that no softmax sees; finite, so that its gradient is zero and not NaN


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """InfoNCE: ``temperature`` divides the cosines; ``symmetric`` adds the target -> query direction (ours).

    ``first_temperature`` (ours) is where a run begins; it falls to ``temperature`` geometrically. A model from
    scratch needs it: while its embeddings say nothing, a small temperature rewards making them all alike.
    """

    temperature: float = 0.02
    first_temperature: float | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("first_temperature", self.first_temperature)):
            if value is not None and value <= 0:
                raise ValueError(f"contrastive.{name} is {value}: it must be positive")

    def at(self, progress: Float[Array, ""] | float) -> Float[Array, ""] | float:
        """The temperature when this share of the run, 0 to 1, is done."""
        if self.first_temperature is None:
            return self.temperature
        return self.first_temperature ** (1 - progress) * self.temperature**progress


def embed_examples(model: Qwen2VL, batch: Mapping[str, Array]) -> Float[Array, "X W"]:
    """Unit-length embeddings of the batch's examples in the batch's order, float32.

    The K bridge tokens of an example are normalised one by one and concatenated, so W = K D and the
    cosine of two embeddings is the mean cosine of their tokens; K = 1 is the paper.
    """
    return _in_order(_embed_slots(model, Inputs.from_batch(batch), batch["pool"]), batch["example"])


def embed_in_chunks(model_of: ModelOf, batch: Mapping[str, Array], rows: int | None) -> Float[Array, "X W"]:
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
        return embed_examples(model_of(jnp.int32(0)), batch)
    if own % rows:
        raise ValueError(f"compute.chunk_rows is {rows}, a device has {own} rows: choose a divisor of them")

    @jax.checkpoint
    def embed(number: Array, inputs: Inputs, pool: Array) -> Array:
        inputs, pool = jax.tree.map(over_rows, (inputs, pool))
        return over_rows(_embed_slots(model_of(number), inputs, pool))

    chunks = jax.tree.map(lambda x: _cut(x, parts, rows), (Inputs.from_batch(batch), pool))
    numbers = jnp.arange(own // rows)
    _, slots = jax.lax.scan(lambda carry, chunk: (carry, embed(*chunk)), None, (numbers, *chunks))
    return _in_order(_joined(slots, parts, rows), batch["example"])


def _embed_slots(model: Qwen2VL, inputs: Inputs, pool: Int[Array, "B E K"]) -> Float[Array, "B E W"]:
    """The embedding of every slot for an example; one that is not used holds something that nobody takes."""
    hidden, (B, E, K) = model(inputs), pool.shape
    columns = jnp.maximum(pool.reshape(B, E * K), 0)
    pooled = jnp.take_along_axis(hidden, columns[..., None], axis=1)
    pooled = pooled.astype(jnp.promote_types(pooled.dtype, jnp.float32))
    squares = jnp.sum(jnp.square(pooled), axis=-1, keepdims=True)
    # The guard keeps the zero state of an unused slot finite.
    return (pooled * jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) / K**0.5).reshape(B, E, -1)


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


@jax.named_scope("stage3")
def contrastive_loss(
    model_of: ModelOf,
    batch: Mapping[str, Array],
    config: ContrastiveConfig,
    progress: Float[Array, ""] | float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """InfoNCE over the whole global batch, when ``progress`` of the run (0 to 1) is done.

    Args:
        chunk_rows: rows that each device encodes at a time; None for all.

    Source: CoCoA, arXiv 2603.01471, stage 3.
    """
    N = batch["target_key"].shape[0]
    embeddings = embed_in_chunks(model_of, batch, chunk_rows)
    more = batch.get("image_key"), batch.get("negative_key")
    return info_nce(embeddings[:N], embeddings[N:], batch["target_key"], config, progress, *more)


def info_nce(
    queries: Float[Array, "N W"],
    targets: Float[Array, "S W"],
    target_key: Int[Array, " N"],
    config: ContrastiveConfig,
    progress: Float[Array, ""] | float = 1.0,
    image_key: Int[Array, " N"] | None = None,
    negative_key: Int[Array, " R"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean of -log softmax of each query's own target among all targets and hard negatives.

    Args:
        queries: unit length.
        targets: unit length; the first N belong to the queries in order, the rest are hard negatives.
        target_key: two targets of equal key show the same thing and are no negatives of each other.
        progress: the share of the run that is done, which sets the temperature.
        image_key: nor are the targets of two queries of equal key from 0, which show the same pictures.
        negative_key: a hard negative of equal key to a target is no negative of its query; R = S - N.
    """
    N, S = queries.shape[0], targets.shape[0]
    cosines = over_rows(queries) @ targets.T
    same = target_key[:, None] == target_key[None, :]
    if image_key is not None:
        same |= (image_key[:, None] == image_key[None, :]) & (image_key[:, None] >= 0)
    same &= ~jnp.eye(N, dtype=bool)
    if negative_key is None:
        excluded = jnp.pad(same, ((0, 0), (0, S - N)))
    else:
        excluded = jnp.concatenate([same, target_key[:, None] == negative_key[None, :]], axis=1)
    scores = jnp.where(excluded, NEVER, cosines / config.at(progress))
    own = _diagonal(scores)
    loss = jnp.mean(jax.nn.logsumexp(scores, axis=1) - own)
    if config.symmetric:
        loss = (loss + jnp.mean(jax.nn.logsumexp(scores[:, :N], axis=0) - own)) / 2
    others = jnp.where(excluded | jnp.eye(N, S, dtype=bool), -1.0, cosines)
    hardest = jnp.max(others, axis=1)
    positive = _diagonal(cosines)
    return loss, {
        "contrastive": loss,
        "batch_accuracy": jnp.mean(positive > hardest),
        "positive_cosine": jnp.mean(positive),
        "hardest_cosine": jnp.mean(hardest),
    }


def _diagonal(scores: Float[Array, "N S"]) -> Float[Array, " N"]:
    """By comparison of indices, which devices with a share of the rows can do alone."""
    return jnp.sum(jnp.where(jnp.eye(scores.shape[0], scores.shape[1], dtype=bool), scores, 0.0), axis=1)
