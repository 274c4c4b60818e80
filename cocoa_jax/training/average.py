"""The exponential moving average of what trains, kept with the optimizer's state."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from cocoa_jax.training.state import TrainState, trained_part


class Average(NamedTuple):
    """``updates`` went into ``weights``, which are nested as what trains."""

    updates: Int[Array, ""]
    weights: Any


def averaged(decay: float) -> optax.GradientTransformation:
    """Updates pass as they are; the weights that they lead to enter an average. To be the last of a chain.

    After n updates the decay is the smaller of ``decay`` and (1 + n) / (10 + n), so that the weights which a run begins
    with do not weigh on a short one.
    """

    def init(params: Any) -> Average:
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        kept = jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
        moved = optax.apply_updates(params, updates)
        weights = jax.tree.map(lambda old, new: old + (1 - kept) * (new - old), state.weights, moved)
        return updates, Average(state.updates + 1, weights)

    return optax.GradientTransformation(init, update)


def exchanged(state: TrainState) -> TrainState:
    """The weights and their average in each other's places; as it is where there is no average, its own inverse.

    A checkpoint is written so: what a stage hands on, to the next one, to an ``Embedder`` and to exports, is the
    average; the weights that training itself goes on from lie with the optimizer's state.
    """
    *parts, last = state.optimizer
    if not isinstance(last, Average):
        return state
    params = {**state.params, **last.weights}
    kept = Average(last.updates, trained_part(state.params))
    return dataclasses.replace(state, params=params, optimizer=(*parts, kept))
