"""Stage 2: rebuild block B, words or parts of a picture, from what the bridge token holds of block A."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.mae import ImageDecoder
from cocoa_jax.models.qwen2_vl import Qwen2VL
from cocoa_jax.objectives.masked_text import masked_text_loss
from cocoa_jax.objectives.warmup import WarmupConfig, picture_loss, without_hidden

_PICTURES = WarmupConfig()


@jax.named_scope("stage2")
def bridge_loss(
    model: Qwen2VL,
    batch: Mapping[str, Array],
    chunk_tokens: int | None = None,
    decoder: ImageDecoder | None = None,
    pictures: WarmupConfig = _PICTURES,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of the masked tokens of block B; the truncated attention is in the batch's spans.

    With a decoder, ``pictures.mae_weight`` times the error of block B's hidden units is added, as in stage 1: its layer
    sees what the batch's spans allow. A chunk of a batch has the ``masked_total`` and ``hidden_total`` of the whole,
    see ``masked_text_loss``.

    Args:
        chunk_tokens: see ``masked_text_loss``.

    Source: CoCoA, arXiv 2603.01471, stage 2; pictures in block B are ours.
    """
    inputs = Inputs.from_batch(batch)
    hidden = model(inputs if decoder is None else without_hidden(inputs, batch, pictures))
    chosen = batch["predict_at"], batch["predict_id"]
    text, metrics = masked_text_loss(model, hidden, *chosen, chunk_tokens, batch.get("masked_total"))
    found = {"bridge": text, **metrics}
    if decoder is None:
        return text, found
    image = picture_loss(decoder, hidden, inputs, batch["hidden_unit"], batch.get("hidden_total"))
    return text + pictures.mae_weight * image, {**found, "mae": image}
