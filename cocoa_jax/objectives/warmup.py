"""Stage 1: rebuild masked words and masked picture units under bidirectional attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.mae import ImageDecoder
from cocoa_jax.models.qwen2_vl import Qwen2VL
from cocoa_jax.objectives.masked_text import masked_text_loss


@dataclasses.dataclass(frozen=True)
class WarmupConfig:
    """The picture loss of stage 1, and of stage 2 where block B holds pictures.

    Args:
        mae_weight: scales it beside the text loss (0.5 in the paper).
        noise: what stands in the place of hidden units: noise of each ``unit``'s own, or the same ``shared`` by all
            units of a step (as in MoCa).
    """

    mae_weight: float = 0.5
    noise: Literal["unit", "shared"] = "unit"


@jax.named_scope("stage1")
def warmup_loss(
    model: Qwen2VL,
    decoder: ImageDecoder,
    batch: Mapping[str, Array],
    config: WarmupConfig,
    chunk_tokens: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """``mntp + mae_weight * mae`` of a batch whose text is masked already and whose pictures are not.

    With shared noise the batch has its ``step`` too. A chunk of a batch has ``masked_total`` and ``hidden_total`` of
    the whole, see ``masked_text_loss``.

    Args:
        chunk_tokens: see ``masked_text_loss``.

    Source: CoCoA, arXiv 2603.01471, stage 1.
    """
    return rebuilding_loss(model, decoder, batch, config, chunk_tokens, "mntp")


def rebuilding_loss(
    model: Qwen2VL,
    decoder: ImageDecoder,
    batch: Mapping[str, Array],
    config: WarmupConfig,
    chunk_tokens: int | None,
    words: str,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What both stages that rebuild pictures have in common; who sees whom is in the batch's spans.

    Args:
        words: what the loss of the text is called among the metrics.
    """
    inputs = Inputs.from_batch(batch)
    seeds = batch["unit_seed"]
    if config.noise == "shared":
        seeds = jnp.full_like(seeds, batch["step"])
    shown = hide_units(inputs.patches, batch["hidden_unit"], seeds)
    hidden = model(dataclasses.replace(inputs, patches=shown))
    chosen = batch["predict_at"], batch["predict_id"]
    text, metrics = masked_text_loss(model, hidden, *chosen, chunk_tokens, batch.get("masked_total"))
    image = picture_loss(decoder, hidden, inputs, batch["hidden_unit"], batch.get("hidden_total"))
    return text + config.mae_weight * image, {words: text, "mae": image, **metrics}


def hide_units(
    patches: Float[Array, "B P C"], hidden_unit: Bool[Array, "B U"], unit_seed: UInt32[Array, "B U"]
) -> Float[Array, "B P C"]:
    """Put standard normal noise, drawn from each unit's own seed, in the place of the pixels of chosen units."""
    (B, P, C), U = patches.shape, hidden_unit.shape[1]
    units = patches.reshape(B, U, P * C // max(U, 1))  # a shape for text alone has none
    draw = jax.vmap(jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), units.shape[2:])))
    return jnp.where(hidden_unit[..., None], draw(unit_seed), units).astype(patches.dtype).reshape(B, P, C)


@jax.named_scope("decoder")
def picture_loss(
    decoder: ImageDecoder,
    hidden: Float[Array, "B T D"],
    inputs: Inputs,
    hidden_unit: Bool[Array, "B U"],
    total: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the rebuilt pixels over the chosen units of the whole batch.

    ``total`` is how many those are where the rows are but a chunk of it.
    """
    drawn = decoder(hidden, inputs.positions, inputs.spans, token_of_unit(inputs.unit, hidden_unit.shape[1]))
    true = inputs.patches.reshape(drawn.shape)
    errors = jnp.mean(jnp.square(drawn.astype(jnp.float32) - true), axis=-1)
    count = jnp.sum(hidden_unit) if total is None else total
    return jnp.sum(jnp.where(hidden_unit, errors, 0.0)) / jnp.maximum(count, 1)


def token_of_unit(unit: Int[Array, "B T"], units: int) -> Int[Array, "B U"]:
    """The column that shows each unit: the inverse of ``unit``; 0 for units that nobody shows."""
    B, T = unit.shape
    place = jnp.where(unit >= 0, unit, units)  # out of bounds: dropped
    columns = jnp.broadcast_to(jnp.arange(T, dtype=unit.dtype), (B, T))
    return jnp.zeros((B, units), unit.dtype).at[jnp.arange(B)[:, None], place].set(columns, mode="drop")
