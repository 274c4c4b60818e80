"""AdamW and its schedule from a config."""

from __future__ import annotations

from typing import Any

import jax
import optax

from cocoa_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step.

    Raises:
        ValueError: an unknown schedule, or a warm-up that does not end before the run does.
    """
    if config.warmup_steps >= steps:
        raise ValueError(f"optimizer.warmup_steps is {config.warmup_steps} of {steps} steps: it must be smaller")
    rate, rest = config.learning_rate, steps - config.warmup_steps
    tails = {
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "constant": optax.constant_schedule(rate),
    }
    if config.schedule not in tails:
        raise ValueError(f"optimizer.schedule is {config.schedule!r}: choose one of {sorted(tails)}")
    warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
    return optax.join_schedules([warmup, tails[config.schedule]], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping and AdamW; only maps and their low-rank updates decay, never norms, biases or the embedding."""
    return optax.chain(
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
    )


def _decays(params: Any) -> Any:
    return jax.tree.map_with_path(lambda keys, _: keys[-1].key in ("kernel", "a", "b"), params)


def _is_head(params: Any) -> Any:
    return {name: name == "head" for name in params}
