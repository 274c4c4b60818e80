"""FLOPs of a train step by arithmetic: the matrix products that the method asks for, recomputation left out.

A product of n rows with a map [I, O] is 2 n I O FLOPs, and as much again for the gradient of its rows and for that of
the map, where there is one. A query that sees a key is 4 H FLOPs a head, and 8 H backward. Norms, activations, noise
and the optimizer are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from cocoa_jax.config import TrainConfig
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.lora import LoraConfig, adapted_maps
from cocoa_jax.models.mae import decoder_graph
from cocoa_jax.models.qwen2_vl import abstract_params
from cocoa_jax.objectives.contrastive import tokens_of


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch asks of a model.

    Args:
        tokens, patches: that its examples hold.
        token_pairs: of a token and one that it sees.
        patch_pairs: of a patch and one that it sees in a full vision layer.
        window_pairs: the same in a windowed layer; 0 where the family has none.
        predicted: tokens that stages 1 and 2 predict.
        queries, targets: embeddings that stage 3 compares.
    """

    tokens: float
    patches: float
    token_pairs: float
    patch_pairs: float
    window_pairs: float = 0
    predicted: float = 0
    queries: int = 0
    targets: int = 0

    @classmethod
    def of_batch(cls, batch: Mapping[str, np.ndarray], tokens: int, patches: int, predicted: float) -> Work:
        """The work of a global batch without its padding.

        Args:
            batch: this process's rows; its pairs stand for those of the others, by their tokens and patches.
            tokens, patches, predicted: of the global batch.
        """

        def pairs(name: str, total: int) -> float:
            if f"{name}_start" not in batch:
                return 0.0
            seen = batch[f"{name}_end"] - batch[f"{name}_start"]
            return float(seen.sum(dtype=np.int64)) * total / max(int((seen > 0).sum()), 1)

        queries = len(batch["target_key"]) if "target_key" in batch else 0
        targets = len(batch["example"]) - queries if queries else 0
        seen = pairs("token", tokens), pairs("patch", patches), pairs("window", patches)
        return cls(tokens, patches, *seen, predicted, queries, targets)


class StepFlops:
    """Counts for one stage: ``StepFlops(config, backbone)(work)``, of all devices together."""

    def __init__(self, config: TrainConfig, backbone: Qwen2VLConfig):
        self._config, self._backbone = config, backbone
        self._maps = tuple(_maps(abstract_params(backbone), config.lora))
        self._head = _decoder(backbone) if config.batches().rebuilds_pictures else ()

    def __call__(self, work: Work) -> float:
        """FLOPs of one step, forward and backward."""
        text = self._backbone.text
        rows = {
            "tokens": work.tokens,
            "patches": work.patches,
            "units": work.patches / self._backbone.vision.unit_patches,
            "predicted": work.predicted,
            "once": 1.0,
        }
        total = sum(rows[what] * flops for what, flops in (*self._maps, *self._head))
        total += self._attention(work)
        if self._head:
            total += 12 * text.head_width * text.heads * work.token_pairs
        return total + self._comparison(work)

    def _attention(self, work: Work) -> float:
        text, vision = self._backbone.text, self._backbone.vision
        full = len(vision.full_layers) if vision.window else vision.layers
        pairs = full * work.patch_pairs + (vision.layers - full) * work.window_pairs
        passes = 3 if _vision_trains(abstract_params(self._backbone), self._config.lora) else 1
        seen = text.layers * text.heads * text.head_width * work.token_pairs * 3
        return 4.0 * (seen + vision.width * pairs * passes)

    def _comparison(self, work: Work) -> float:
        """Scores of all queries and targets."""
        settings, width = self._config.contrastive, self._backbone.text.width
        kept = tokens_of(settings.pooling, settings.tokens, len(self._config.data.processor.bridge_tokens))
        apart = kept if settings.tokens == "max_sim" else 1
        return 6.0 * work.queries * work.targets * apart * kept * (width + sum(settings.widths))


def _maps(params: Mapping[str, Any], lora: LoraConfig | None) -> Iterator[tuple[str, float]]:
    """What passes through each map of the backbone, and FLOPs of one of them in one step."""
    adapted = adapted_maps(dict(params), lora) if lora is not None else {}
    vision_trains = _vision_trains(params, lora)
    for path, kernel in flatten_dict(params, sep=".").items():
        if not path.endswith(".kernel") or path == "text.head.kernel":
            continue
        size, name = math.prod(kernel.shape), path.removesuffix(".kernel")
        what = "units" if ".merger." in path else "tokens" if path.startswith("text.") else "patches"
        # Nobody asks for the gradient of pixels, nor for that of a tower without anything that trains.
        passes = 1 + (name != "vision.patch_embed" and (what == "tokens" or vision_trains)) + (lora is None)
        yield what, 2.0 * size * passes
        if lora is not None and name in adapted:
            yield from ((what if n else "once", flops) for n, flops in _low_rank(kernel.shape, lora))
    table = params["text"]["embed"]["table"]
    yield "predicted", 2.0 * math.prod(table.shape) * (3 if lora is None else 2)


def _low_rank(shape: tuple[int, ...], lora: LoraConfig) -> Iterator[tuple[bool, float]]:
    """FLOPs that an adapter adds to its map: for every row, or (False) once a step."""
    *stack, inputs, outputs = shape
    layers, rank = math.prod(stack), lora.rank
    yield True, 6.0 * layers * rank * (inputs + outputs)
    if lora.dora:
        if lora.dropout and lora.dora_dropout == "peft":
            yield True, 4.0 * layers * inputs * outputs  # dropped inputs meet the frozen kernel apart
        yield False, 2.0 * layers * rank * (inputs * outputs + rank * (inputs + outputs))  # lengths of the columns


def _vision_trains(params: Mapping[str, Any], lora: LoraConfig | None) -> bool:
    return lora is None or any(path.startswith("vision.") for path in adapted_maps(dict(params), lora))


def _decoder(backbone: Qwen2VLConfig) -> tuple[tuple[str, float], ...]:
    """As ``_maps``, of the decoder of stage 1: a layer on all tokens and a map on the units."""
    kernels = flatten_dict(decoder_graph(backbone)[1], sep=".").items()
    return tuple(
        ("tokens" if path.startswith("layer.") else "units", 6.0 * math.prod(kernel.shape))
        for path, kernel in kernels
        if path.endswith(".kernel")
    )
