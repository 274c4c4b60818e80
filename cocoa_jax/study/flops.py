"""FLOPs of a train step, counted from its sizes: what "equal compute" means in a study."""

from __future__ import annotations

import dataclasses

from cocoa_jax.config import TrainConfig
from cocoa_jax.data.packing import Shape
from cocoa_jax.data.processor import Processor
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.training.inputs import open_batches

BACKWARD = 3  # the gradient costs two more forward passes; what `remat` repeats is not counted as work
_BATCHES = 2  # of every kind of records


def step_flops(config: TrainConfig, processor: Processor) -> float:
    """The mean FLOPs of a step of a stage, padding included.

    Batches of stage 3 come from one kind of records at a time, whose shapes differ: each counts by its weight.
    """
    kinds = config.data.kinds
    parts = [{kind: 1.0} for kind in kinds] if config.stage == "contrastive" else [dict(kinds)]
    weights = list(kinds.values()) if config.stage == "contrastive" else [1.0]
    total = 0.0
    for part, weight in zip(parts, weights, strict=True):
        data = dataclasses.replace(config.data, kinds=part, threads=1, workers=0)
        loop = dataclasses.replace(config.loop, steps=_BATCHES)
        batches = iter(open_batches(dataclasses.replace(config, data=data, loop=loop), processor))
        for _ in range(_BATCHES):
            batch = next(batches)
            (rows, tokens), patches = batch["tokens"].shape, batch["patches"].shape[1]
            total += weight * batch_flops(config, processor.config, Shape(rows, tokens, patches)) / _BATCHES
    return total / sum(weights)


def batch_flops(config: TrainConfig, backbone: Qwen2VLConfig, shape: Shape) -> float:
    """FLOPs of matrix products, forward and backward, of one batch of this shape; a product and a sum are two.

    Attention counts whole rows: that is what a dense implementation does, and an upper bound for one that skips.
    """
    text, vision = backbone.text, backbone.vision
    B, T, P = shape
    U, M = P // vision.unit_patches, config.data.rows.masked_per_row
    layer = text_layer(backbone, T)
    work = B * T * layer * text.layers
    if P:
        merged = vision.unit_patches * vision.width
        work += B * P * 2 * vision.patch_values * vision.width
        work += B * P * vision.layers * _vision_layer(backbone, P)
        work += B * U * 2 * (merged * merged + merged * text.width)
    if config.stage != "contrastive":
        work += B * M * 2 * text.width * text.vocab_size
    if config.batches().rebuilds_pictures:
        work += B * T * layer + B * U * 2 * text.width * vision.unit_patches * vision.patch_values
    return float(BACKWARD * work)


def text_layer(backbone: Qwen2VLConfig, T: int) -> int:
    """Forward FLOPs of one layer of the language model, for one token of a row of T."""
    text = backbone.text
    queries, keys = text.heads * text.head_width, text.kv_heads * text.head_width
    maps = 2 * text.width * (2 * queries + 2 * keys + 3 * text.mlp_width)
    return maps + 4 * T * queries


def _vision_layer(backbone: Qwen2VLConfig, P: int) -> int:
    vision = backbone.vision
    inner = 3 if vision.window else 2  # maps of the MLP: the windowed family has a gated one
    return 2 * vision.width * (4 * vision.width + inner * vision.mlp_width) + 4 * P * vision.width
