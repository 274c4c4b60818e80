"""The train step of every stage: one jitted function with explicit shardings and donated state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array

from cocoa_jax.training.state import TrainState

Loss = Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]
Step = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]


def make_step(loss: Loss, optimizer: optax.GradientTransformation, wanted: TrainState, steps: int) -> Step:
    """The update of one batch.

    Args:
        loss: ``(params, batch, progress) -> (loss, metrics)``, a mean over the global batch; progress is the share
            of the run that is done, 0 to 1.
        optimizer: as in the state.
        wanted: shapes and shardings of the state, which go in and come out.
        steps: length of the run.

    Returns:
        ``(state, batch) -> (state, metrics)``; the state that goes in is used up.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, wanted)

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, state.step / steps)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, **metrics, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, moments), metrics

    # The batch arrives with its own shardings; the state's are pinned on both sides so that donation holds.
    return jax.jit(step, in_shardings=(places, None), out_shardings=(places, None), donate_argnums=0)
