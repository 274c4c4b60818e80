"""The true train step of a stage, compiled for a TPU slice from settings and sizes alone: no weights, no data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cocoa_jax.config import TrainConfig, find_config
from cocoa_jax.models.config import Qwen2VLConfig, read_config
from cocoa_jax.profiling.topology import Slice, slice_mesh
from cocoa_jax.training.mesh import AXES, batch_shards, mesh_sizes, replicated, rows_sharding
from cocoa_jax.training.optimizer import make_optimizer
from cocoa_jax.training.place import GLOBAL
from cocoa_jax.training.stages import stage_program
from cocoa_jax.training.state import TrainState, abstract_state
from cocoa_jax.training.step import make_step

Batch = dict[str, jax.ShapeDtypeStruct]


def read_backbone(folder: str) -> Qwen2VLConfig:
    """Sizes of the backbone that a config names; a ``config.json`` is all that the folder has to hold.

    Raises:
        ConfigError: it holds none, or one of another architecture.
    """
    return read_config(find_config(str(Path(folder) / "config.json")).parent)


def step_mesh(config: TrainConfig, target: Slice) -> Mesh:
    """The mesh of a run of ``config`` on this slice.

    Raises:
        TopologyError, ValueError: the sizes of ``config.mesh`` do not fit the slice.
    """
    sizes = mesh_sizes(config.mesh, len(target.devices), target.slices)
    return slice_mesh(target, dict(zip(AXES, sizes, strict=True)))


def abstract_batch(config: TrainConfig, backbone: Qwen2VLConfig, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of a batch of its widest shape; see ``cocoa_jax.data.rows`` for the entries.

    Raises:
        PackingError: the rows cannot be shared by the devices.
    """
    rows, vision = config.data.rows, backbone.vision
    rows.check_shared(batch_shards(mesh), "devices")
    (B, T, P), E, M = rows.widest, rows.examples_per_row, rows.masked_per_row
    U, N, K = P // vision.unit_patches, rows.batch_size, len(config.data.processor.bridge_tokens)
    integers: dict[str, tuple[int, ...]] = {
        "tokens": (B, T),
        "positions": (B, T, 3),
        "token_start": (B, T),
        "token_end": (B, T),
        "unit": (B, T),
        "patch_positions": (B, P, 2),
        "patch_start": (B, P),
        "patch_end": (B, P),
        "pool": (B, E, K),
        "example": (N,),
    }
    if vision.window:
        integers |= {"window_start": (B, P), "window_end": (B, P)}
    if config.stage == "contrastive":
        R = N * config.data.negatives
        integers |= {"example": (2 * N + R,), "target_key": (N,), "image_key": (N,)}
        integers |= {"negative_key": (R,)} if R else {}
    else:
        integers |= {"predict_at": (B, M), "predict_id": (B, M)}
    shapes = {name: (shape, jnp.int32) for name, shape in integers.items()}
    shapes["patches"] = ((B, P, vision.patch_values), jnp.float32)
    if config.batches().rebuilds_pictures:
        shapes |= {"hidden_unit": ((B, U), jnp.bool_), "unit_seed": ((B, U), jnp.uint32)}
    places = {name: replicated(mesh) if name in GLOBAL else rows_sharding(mesh) for name in shapes}
    return {name: jax.ShapeDtypeStruct(*shape, sharding=places[name]) for name, shape in shapes.items()}


def abstract_step(config: TrainConfig, backbone: Qwen2VLConfig, mesh: Mesh) -> tuple[Any, TrainState, Batch]:
    """The jitted step of a stage, as the trainer makes it, and descriptions of what it takes.

    Returns:
        ``step, state, batch``: ``step.lower(state, batch)`` needs no array.
    """
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    # Which rows the mask and bridge tokens have does not matter here, only that they are as many.
    special = tuple(range(1 + len(config.data.processor.bridge_tokens)))
    program = stage_program(config, backbone, special)
    state = abstract_state(program.shapes, optimizer, mesh)
    step = make_step(program.loss, optimizer, state, config.loop.steps)
    return step, state, abstract_batch(config, backbone, mesh)


def compile_step(config: TrainConfig, backbone: Qwen2VLConfig, mesh: Mesh) -> jax.stages.Compiled:
    """Compile the whole train step of ``config.stage`` for the devices of ``mesh``.

    Raises:
        ValueError: rows or sizes that do not fit the mesh.
        jax.errors.JaxRuntimeError: it does not fit the device's memory; the message names the total.
    """
    step, state, batch = abstract_step(config, backbone, mesh)
    # Pallas asks the current mesh which chip it is lowered for.
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile()


def parameter_count(state: TrainState) -> int:
    """How many numbers are trained."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
