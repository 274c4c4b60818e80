"""Stage 2: rebuild block B, words or parts of a picture, from what the bridge token holds of block A."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.mae import ImageDecoder
from cocoa_jax.models.qwen2_vl import Qwen2VL
from cocoa_jax.objectives.masked_text import masked_text_loss
from cocoa_jax.objectives.warmup import WarmupConfig, rebuilding_loss


@jax.named_scope("stage2")
def bridge_loss(
    model: Qwen2VL, batch: Mapping[str, Array], chunk_tokens: int | None = None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of the masked tokens of block B; the truncated attention is in the batch's spans.

    A chunk of a batch has the ``masked_total`` of the whole, see ``masked_text_loss``.

    Args:
        chunk_tokens: see ``masked_text_loss``.

    Source: CoCoA, arXiv 2603.01471, stage 2.
    """
    hidden = model(Inputs.from_batch(batch))
    chosen = batch["predict_at"], batch["predict_id"]
    loss, metrics = masked_text_loss(model, hidden, *chosen, chunk_tokens, batch.get("masked_total"))
    return loss, {"bridge": loss, **metrics}


@jax.named_scope("stage2")
def bridge_picture_loss(
    model: Qwen2VL,
    decoder: ImageDecoder,
    batch: Mapping[str, Array],
    config: WarmupConfig,
    chunk_tokens: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """``bridge + mae_weight * mae``, where block B may hold pictures too (ours); arguments as for ``warmup_loss``."""
    return rebuilding_loss(model, decoder, batch, config, chunk_tokens, "bridge")
