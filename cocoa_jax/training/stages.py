"""What a stage trains: its loss over parameters and batch, and what trains beside the backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array

from cocoa_jax.config import TrainConfig
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.mae import decoder_graph, init_decoder
from cocoa_jax.models.qwen2_vl import Params, bind, graph_of
from cocoa_jax.objectives.bridge import bridge_loss
from cocoa_jax.objectives.contrastive import contrastive_loss
from cocoa_jax.objectives.warmup import warmup_loss
from cocoa_jax.training.step import Loss


@dataclasses.dataclass(frozen=True)
class Program:
    """A stage in functional form.

    Args:
        shapes: abstract {"backbone": ..., "head": ...}.
        loss: ``(params, batch, progress) -> (loss, metrics)``.
        init_head: the head's first weights from the backbone's; an empty dict where a stage has none.
    """

    shapes: Params
    loss: Loss
    init_head: Callable[[Params], Params]


def stage_program(config: TrainConfig, backbone: Qwen2VLConfig) -> Program:
    """The program of ``config.stage`` on a backbone of these sizes."""
    graph, shapes = graph_of(backbone, config.compute)
    if config.stage == "warmup":
        return _warmup(config, backbone, graph, shapes)

    def loss(params: Any, batch: Mapping[str, Array], progress: Array) -> tuple[Array, dict[str, Array]]:
        model = bind(graph, params["backbone"])
        if config.stage == "bridge":
            return bridge_loss(model, batch)
        return contrastive_loss(model, batch, config.contrastive, progress)

    return Program({"backbone": shapes, "head": {}}, loss, lambda _: {})


def _warmup(config: TrainConfig, backbone: Qwen2VLConfig, graph: Any, shapes: Params) -> Program:
    head_graph, head_shapes = decoder_graph(backbone, config.compute.attention)

    def loss(params: Any, batch: Mapping[str, Array], progress: Array) -> tuple[Array, dict[str, Array]]:
        model, decoder = bind(graph, params["backbone"]), bind(head_graph, params["head"])
        return warmup_loss(model, decoder, batch, config.warmup)

    return Program(
        {"backbone": shapes, "head": head_shapes}, loss, lambda params: init_decoder(backbone, params, config.seed)
    )
