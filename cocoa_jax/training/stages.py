"""What a stage trains: its loss over parameters and batch, and what trains beside the backbone or in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cocoa_jax.config import TrainConfig
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.lora import AdapterRecord, adapted_graph, column_norms, init_adapter, join
from cocoa_jax.models.mae import decoder_graph, init_decoder
from cocoa_jax.models.qwen2_vl import Params, Qwen2VL, abstract_params, bind, graph_of
from cocoa_jax.objectives.bridge import bridge_loss, bridge_picture_loss
from cocoa_jax.objectives.contrastive import contrastive_loss
from cocoa_jax.objectives.warmup import warmup_loss
from cocoa_jax.training.accumulation import accumulated
from cocoa_jax.training.step import Loss

Model = Callable[[Params, Mapping[str, Array]], Qwen2VL]


@dataclasses.dataclass(frozen=True)
class Program:
    """A stage in functional form.

    Args:
        shapes: abstract {"backbone": ..., "head": ...}, and "adapter" where the backbone is frozen.
        loss: ``(params, batch, progress) -> (loss, metrics)``.
        init_head: the head's first weights from the backbone's; an empty dict where a stage has none.
        init_adapter: the adapter's first weights from the backbone's; None where the backbone itself trains.
        adapter: what the stage notes about its adapter.
    """

    shapes: Params
    loss: Loss
    init_head: Callable[[Params], Params]
    init_adapter: Callable[[Params], Params] | None = None
    adapter: AdapterRecord | None = None

    def first_params(self, backbone: Params) -> Params:
        """Everything that a run begins with, from the weights of its backbone."""
        params = {"backbone": backbone, "head": self.init_head(backbone)}
        return params if self.init_adapter is None else {**params, "adapter": self.init_adapter(backbone)}


def stage_program(config: TrainConfig, backbone: Qwen2VLConfig, special: tuple[int, ...] = ()) -> Program:
    """The program of ``config.stage`` on a backbone of these sizes.

    Args:
        special: ids of the mask and bridge tokens, whose rows train beside an adapter.

    Raises:
        LoraError: an adapter that does not fit the backbone.
    """
    if config.lora is None:
        graph, shapes = graph_of(backbone, config.compute)
        return _with_loss(config, backbone, lambda params, _: bind(graph, params["backbone"]), {"backbone": shapes})
    rows = tuple(sorted(set(special))) if config.lora.tokens else ()
    return _adapted(config, backbone, AdapterRecord(config.lora, rows))


def _adapted(config: TrainConfig, backbone: Qwen2VLConfig, adapter: AdapterRecord) -> Program:
    dropout = adapter.config.dropout > 0
    graph, trained = adapted_graph(backbone, config.compute, adapter.config, adapter.rows, dropout=dropout)
    dtype = jnp.dtype(adapter.config.base_dtype)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(backbone))

    def model(params: Params, batch: Mapping[str, Array]) -> Qwen2VL:
        # A function of (seed, step) alone, as a batch is: a run that is continued drops the same numbers.
        key = jax.random.fold_in(jax.random.key(config.seed), batch["step"]) if dropout else None
        chunk = batch.get("chunk", 0), batch.get("chunks", 1)
        return bind(graph, join(params["backbone"], params["adapter"], params["norms"], key, chunk))

    def init(params: Params) -> Params:
        return init_adapter(params, adapter.config, adapter.rows, config.seed)

    program = _with_loss(config, backbone, model, {"backbone": frozen, "adapter": trained})

    def loss(params: Any, batch: Mapping[str, Array], progress: Array) -> tuple[Array, dict[str, Array]]:
        norms = column_norms(params["backbone"], params["adapter"], adapter.config.scale)
        return program.loss({**params, "norms": norms}, batch, progress)

    return dataclasses.replace(program, loss=loss, init_adapter=jax.jit(init), adapter=adapter)


def _with_loss(config: TrainConfig, backbone: Qwen2VLConfig, model: Model, shapes: Params) -> Program:
    if config.batches().rebuilds_pictures:
        return _with_decoder(config, backbone, model, shapes)

    def bridge(params: Any, batch: Mapping[str, Array], progress: Array) -> tuple[Array, dict[str, Array]]:
        return bridge_loss(model(params, batch), batch, config.compute.chunk_tokens)

    def contrastive(params: Any, batch: Mapping[str, Array], progress: Array) -> tuple[Array, dict[str, Array]]:
        def model_of(chunk: Array, chunks: int) -> Qwen2VL:
            return model(params, {**batch, "chunk": chunk, "chunks": jnp.int32(chunks)})

        chunks = config.compute.chunk_rows, config.compute.chunk_remat
        return contrastive_loss(model_of, batch, config.contrastive, progress, *chunks)

    loss = _in_chunks(bridge, config) if config.stage == "bridge" else contrastive
    return Program({**shapes, "head": {}}, loss, lambda _: {})


def _in_chunks(loss: Loss, config: TrainConfig) -> Loss:
    return loss if config.compute.chunk_rows is None else accumulated(loss, config.compute.chunk_rows)


def _with_decoder(config: TrainConfig, backbone: Qwen2VLConfig, model: Model, shapes: Params) -> Program:
    head_graph, head_shapes = decoder_graph(backbone, config.compute.attention)
    loss_of = warmup_loss if config.stage == "warmup" else bridge_picture_loss

    def loss(params: Any, batch: Mapping[str, Array], progress: Array) -> tuple[Array, dict[str, Array]]:
        decoder = bind(head_graph, params["head"])
        return loss_of(model(params, batch), decoder, batch, config.warmup, config.compute.chunk_tokens)

    def init_head(params: Params) -> Params:
        # The head trains in its own precision, whatever that of a frozen backbone.
        made = init_decoder(backbone, params, config.seed)
        return jax.tree.map(lambda leaf, shape: jnp.asarray(leaf, shape.dtype), made, head_shapes)

    return Program({**shapes, "head": head_shapes}, _in_chunks(loss, config), init_head)
