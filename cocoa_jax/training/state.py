"""What a train step reads and writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from cocoa_jax.training.mesh import replicated
from cocoa_jax.training.sharding import param_shardings, state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """``step`` counts updates done; ``params`` is {"backbone": ..., "head": ...}; ``optimizer`` is optax's."""

    step: Any  # an array, or its description
    params: Any
    optimizer: Any


def abstract_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the whole state, from the shapes of the parameters."""
    shapes = jax.eval_shape(optimizer.init, params)

    def place(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return TrainState(
        step=place(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh)),
        params=jax.tree.map(place, params, param_shardings(params, mesh)),
        optimizer=jax.tree.map(place, shapes, state_shardings(shapes, params, mesh)),
    )


def first_state(params: Any, optimizer: optax.GradientTransformation, wanted: TrainState) -> TrainState:
    """A fresh state whose parts lie where ``wanted`` says; ``params`` may be on the host."""
    places = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    params = jax.tree.map(jax.device_put, params, places.params)
    moments = jax.jit(optimizer.init, out_shardings=places.optimizer)(params)
    return TrainState(jax.device_put(jnp.int32(0), places.step), params, moments)
