"""Learning rates by step, and which parameters decay."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from cocoa_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        # By step: 0, half of the warm-up, its end, half of the rest, the end.
        ("linear", [0, 0.5, 1, 0.5, 0]),
        ("cosine", [0, 0.5, 1, 0.5, 0]),
        ("constant", [0, 0.5, 1, 1, 1]),
        ("wsd", [0, 0.5, 1, 1, 0]),
    ],
)
def test_schedules(schedule, want):
    rate = make_schedule(OptimizerConfig(learning_rate=3.0, schedule=schedule, warmup_steps=4), 14)
    np.testing.assert_allclose([rate(step) for step in (0, 2, 4, 9, 14)], 3 * np.array(want), atol=1e-6)


def test_cosine_is_a_cosine():
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=0), 8)
    want = (1 + np.cos(np.pi * np.arange(9) / 8)) / 2
    np.testing.assert_allclose([rate(step) for step in range(9)], want, atol=1e-6)


def test_wsd_decays_in_a_line_over_its_last_steps():
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=2, decay_steps=4), 12)
    want = [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    np.testing.assert_allclose([rate(step) for step in range(13)], want, atol=1e-6)


@pytest.mark.parametrize(("schedule", "decay"), [("cosine", 3), ("wsd", 9), ("wsd", 0)])
def test_decay_steps_that_mean_nothing_are_refused(schedule, decay):
    with pytest.raises(ValueError, match=rf"decay_steps is {decay} with schedule '{schedule}': .* the 8 steps after"):
        make_schedule(OptimizerConfig(schedule=schedule, warmup_steps=2, decay_steps=decay), 10)


@pytest.mark.parametrize("warmup", [10, 11])
def test_a_warm_up_that_never_ends_is_refused(warmup):
    with pytest.raises(ValueError, match=rf"warmup_steps is {warmup} of 10 steps: it must be smaller"):
        make_schedule(OptimizerConfig(warmup_steps=warmup), 10)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"'step'.*\['constant', 'cosine', 'linear', 'wsd'\]"):
        make_schedule(OptimizerConfig(schedule="step", warmup_steps=1), 10)


BACKBONE = {"embed": {"table": 1.0}, "norm": {"scale": 1.0}, "map": {"kernel": 1.0, "bias": 1.0}}
PARAMS = jax.tree.map(np.float32, {"backbone": BACKBONE, "head": {"map": {"kernel": 1.0}}})


def update(gradient: float, **settings):
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, **settings)
    optimizer = make_optimizer(config, 10)
    return optimizer.update(jax.tree.map(lambda _: np.float32(gradient), PARAMS), optimizer.init(PARAMS), PARAMS)[0]


def test_only_maps_decay():
    moved = update(0.0, weight_decay=0.5)
    np.testing.assert_allclose(moved["backbone"]["map"].pop("kernel"), -0.05)
    np.testing.assert_allclose(moved["head"]["map"].pop("kernel"), -0.05)
    assert not any(jax.tree.leaves(moved))


def test_no_decay_by_default():
    assert not any(jax.tree.leaves(update(0.0)))


def test_gradients_are_clipped_to_a_global_norm():
    # Adam divides by the size of the gradient, but not by eps: with a large eps the clipped size shows.
    for clip, norm in ((1.0, 1.0), (0.5, 0.5), (1e9, 100.0 * 5**0.5)):
        want = norm / 5**0.5  # of each of the five numbers
        moved = jax.tree.leaves(update(100.0, clip=clip, eps=1e6))
        np.testing.assert_allclose(moved, [-0.1 * want / (1e6 + want)] * 5, rtol=1e-4)


def test_the_head_may_learn_at_another_rate_than_the_backbone():
    moved = update(1.0, head_rate=10.0)
    np.testing.assert_allclose(jax.tree.leaves(moved["backbone"]), [-0.1] * 4, rtol=1e-5)
    np.testing.assert_allclose(jax.tree.leaves(moved["head"]), [-1.0], rtol=1e-5)


def test_the_average_follows_the_weights_and_changes_no_update():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0)
    plain, averaging = (make_optimizer(dataclasses.replace(config, ema=decay), 10) for decay in (None, 0.5))
    params, other = PARAMS, PARAMS
    state, kept, want = plain.init(PARAMS), averaging.init(PARAMS), PARAMS
    for n in range(8):
        gradients = jax.tree.map(lambda leaf, n=n: np.float32(n - 3) * leaf, params)
        (updates, state), (same, kept) = (
            plain.update(gradients, state, params),
            averaging.update(gradients, kept, other),
        )
        params, other = optax.apply_updates(params, updates), optax.apply_updates(other, same)
        decay = min(0.5, (1 + n) / (10 + n))
        want = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, want, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, params, other))
    # float32, eight roundings.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), kept[-1].weights, want)
    assert kept[-1].updates == 8 and not np.isclose(*(tree["head"]["map"]["kernel"] for tree in (want, params)))


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=rf"optimizer.ema is {decay}: give a decay between 0 and 1"):
        OptimizerConfig(ema=decay)
