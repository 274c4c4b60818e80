"""A loss that is no number: the step, what it was fed, and how to see it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from cocoa_jax.checkpoints.places import carry, folder_at, twin
from cocoa_jax.config import TrainConfig
from cocoa_jax.data.pipeline import step_records
from cocoa_jax.data.processor import Processor
from cocoa_jax.training.hosts import is_first
from cocoa_jax.training.inputs import known_bad, open_sources


class Diverged(RuntimeError):
    """A loss that is no number; the message names the step and where its batch and the state before it are."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """A step whose metrics are still on their way.

    Args:
        metrics: of the step and of its data.
        batch: this host's share.
        stats: of the whole batch, see ``cocoa_jax.data.pipeline.STATS``.
        planned: see ``agreement.planned``.
    """

    step: int
    metrics: Mapping[str, Any]
    batch: Mapping[str, np.ndarray]
    stats: np.ndarray
    planned: jax.Array | None = None


def check_finite(pending: Pending, values: Mapping[str, float], config: TrainConfig, processor: Processor) -> None:
    """Nothing where loss and gradient are numbers; else write down what the step was fed.

    Raises:
        Diverged: they are not.
    """
    if not (np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"])):
        what = f"loss is {values['loss']} and gradient norm {values['gradient_norm']} at step {pending.step}"
        _end(what, pending, values, config, processor)


def check_weights(weights: Any, pending: Pending, config: TrainConfig, processor: Processor) -> None:
    """The same of the weights that a step led to, which nobody has computed a loss with yet: to be asked before a save.

    Raises:
        Diverged: some are no numbers.
    """
    if not bool(_all_finite(weights)):
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        _end(f"weights are no numbers after step {pending.step}", pending, values, config, processor)


@jax.jit
def _all_finite(weights: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(weights)]))


def _end(
    what: str, pending: Pending, values: Mapping[str, float], config: TrainConfig, processor: Processor
) -> NoReturn:
    """Write down what the step was fed, and raise.

    OUTPUT/diverged/STEP holds report.json (step, metrics, records, command) and batch-PROCESS.npz. Parameters are not
    there: the same command continues from the checkpoint before and comes to the same step with the same bits.
    """
    inside = f"diverged/{pending.step}"
    folder = twin(config.output) / inside
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"batch-{jax.process_index()}.npz", allow_pickle=False, **pending.batch)
    if is_first():
        (folder / "report.json").write_text(json.dumps(_report(pending, values, config, processor), indent=1))
    carry(config.output)
    raise Diverged(
        f"{what}: its batch and the names of its records are in {folder_at(config.output) / inside}, the last "
        "checkpoint is before it; lower optimizer.learning_rate or raise optimizer.warmup_steps"
    )


def _report(pending: Pending, values: Mapping[str, float], config: TrainConfig, processor: Processor) -> dict[str, Any]:
    mixture = open_sources(config)
    records = step_records(
        config.batches(),
        mixture.sources,
        mixture.weights,
        processor,
        seed=config.seed,
        step=pending.step,
        known=known_bad(config, mixture),
    )
    return {
        "step": pending.step,
        "seed": config.seed,
        # JSON knows neither NaN nor infinity.
        "metrics": {name: value if np.isfinite(value) else str(value) for name, value in values.items()},
        "records": records,
        "again": "the command of this run, unchanged: it continues from the last checkpoint and meets this step again",
    }
