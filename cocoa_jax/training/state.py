"""What a train step reads and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from cocoa_jax.training.mesh import replicated
from cocoa_jax.training.sharding import param_shardings, state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """``step`` counts updates done; ``params`` is {"backbone": ..., "head": ...}, with an "adapter" where the backbone
    is frozen; ``optimizer`` is optax's, of what trains."""

    step: Any  # an array, or its description
    params: Any
    optimizer: Any


def trained_part(params: Mapping[str, Any]) -> dict[str, Any]:
    """What has gradients and optimizer state: everything, but no backbone that has an adapter."""
    return {name: tree for name, tree in params.items() if name != "backbone" or "adapter" not in params}


def abstract_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the whole state, from the shapes of the parameters."""
    shapes = jax.eval_shape(optimizer.init, trained_part(params))

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
    moments = jax.jit(optimizer.init, out_shardings=places.optimizer)(trained_part(params))
    return TrainState(jax.device_put(np.int32(0), places.step), params, moments)
