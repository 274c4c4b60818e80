"""The train step of every stage: one jitted function with explicit shardings and donated state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array

from cocoa_jax.training.gradients import group_norms
from cocoa_jax.training.mesh import compiler_options
from cocoa_jax.training.state import TrainState, trained_part

Loss = Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]
Step = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]


def make_step(loss: Loss, optimizer: optax.GradientTransformation, wanted: TrainState, steps: int) -> Step:
    """The update of one batch.

    Args:
        loss: ``(params, batch, progress) -> (loss, metrics)``, a mean over the global batch; progress is the share
            of the run that is done, 0 to 1. The batch holds the number of the step under ``step``.
        optimizer: as in the state.
        wanted: shapes and shardings of the state, which go in and come out.
        steps: length of the run.

    Returns:
        ``(state, batch) -> (state, metrics)``; the state that goes in is used up. A frozen backbone passes through
        in the same memory.
    """
    places, mesh = jax.tree.map(lambda leaf: leaf.sharding, wanted), wanted.step.sharding.mesh

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        trained, batch = trained_part(state.params), {**batch, "step": state.step}

        def of_trained(part: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
            return loss({**state.params, **part}, batch, state.step / steps)

        # The models ask the mesh in use how rows and heads are shared.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (value, metrics), gradients = jax.value_and_grad(of_trained, has_aux=True)(trained)
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(gradients, state.optimizer, trained)
            params = {**state.params, **optax.apply_updates(trained, updates)}
        metrics = {"loss": value, **metrics, "gradient_norm": optax.tree.norm(gradients), **group_norms(gradients)}
        return TrainState(state.step + 1, params, moments), metrics

    # The batch arrives with its own shardings; the state's are pinned on both sides so that donation holds.
    return jax.jit(
        step,
        in_shardings=(places, None),
        out_shardings=(places, None),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
