"""AdamW and its schedule from a config."""

from __future__ import annotations

from typing import Any

import jax
import optax

from cocoa_jax.config import OptimizerConfig
from cocoa_jax.training.average import averaged


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step.

    Raises:
        ValueError: an unknown schedule, or a warm-up that does not end before the run does.
    """
    if config.warmup_steps >= steps:
        raise ValueError(f"optimizer.warmup_steps is {config.warmup_steps} of {steps} steps: it must be smaller")
    rate, rest = config.learning_rate, steps - config.warmup_steps
    if config.decay_steps is not None and not (config.schedule == "wsd" and 0 < config.decay_steps <= rest):
        raise ValueError(
            f"optimizer.decay_steps is {config.decay_steps} with schedule {config.schedule!r}: it is of 'wsd', from 1 "
            f"to the {rest} steps after the warm-up"
        )
    decay = config.decay_steps or max(1, steps // 10)
    tails = {
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "constant": optax.constant_schedule(rate),
        "wsd": optax.join_schedules(
            [optax.constant_schedule(rate), optax.linear_schedule(rate, 0.0, min(decay, rest))], [max(0, rest - decay)]
        ),
    }
    if config.schedule not in tails:
        raise ValueError(f"optimizer.schedule is {config.schedule!r}: choose one of {sorted(tails)}")
    warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
    return optax.join_schedules([warmup, tails[config.schedule]], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping and AdamW; only maps and their low-rank updates decay, never norms, biases or the embedding.

    Raises:
        ValueError: settings of the schedule that contradict each other.
    """
    parts = [
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decays,
        ),
        optax.masked(optax.scale(config.head_rate), _is_head),
    ]
    if config.ema is not None:
        parts.append(averaged(config.ema))
    return optax.chain(*parts)


def _decays(params: Any) -> Any:
    return jax.tree.map_with_path(lambda keys, _: keys[-1].key in ("kernel", "a", "b"), params)


def _is_head(params: Any) -> Any:
    return {name: name == "head" for name in params}
