"""Differences of arms: paired by query and by seed, checked against a plain loop."""

import dataclasses

import numpy as np
import pytest

from cocoa_jax.study.compare import chance, difference, over_seeds


def test_an_arm_against_itself_differs_by_nothing(made):
    arm = {seed: made("cocoa", seed, 1e-3, 0.4) for seed in range(3)}
    found = difference(arm, arm)
    assert (found.mean, found.low, found.high, found.error, found.seeds, found.clear) == (0, 0, 0, 0, 3, False)


def test_a_difference_is_the_mean_over_seeds_of_tasks(made):
    arm = {seed: made("cocoa", seed, 1e-3, 0.6) for seed in (0, 1, 2)}
    bare = {seed: made("bare", seed, 1e-3, 0.2) for seed in (1, 2, 3)}
    found = difference(arm, bare)
    by_seed = [arm[seed].mean() - bare[seed].mean() for seed in (1, 2)]
    assert found.seeds == 2 and found.mean == pytest.approx(np.mean(by_seed))
    assert found.error == pytest.approx(np.std(by_seed, ddof=1) / 2**0.5)
    assert found.low < found.mean < found.high and found.clear
    assert difference(arm, {9: bare[1]}) is None


def test_a_difference_of_some_tasks_and_of_all_queries_alike(made):
    arm, bare = {0: made("cocoa", 0, 1e-3, 0.6)}, {0: made("bare", 0, 1e-3, 0.2)}
    gains = {name: task.hits.astype(float) - bare[0].tasks[name].hits for name, task in arm[0].tasks.items()}
    tile = np.mean([gains["tile/test_seen"].mean(), gains["tile/test_unseen"].mean()])
    assert difference(arm, bare, ("tile",)).mean == pytest.approx(tile)
    alike = difference(arm, bare, by_query=True)
    assert alike.mean == pytest.approx(np.concatenate([*gains.values()]).mean())
    assert alike.mean != pytest.approx(difference(arm, bare).mean, abs=1e-3)  # tasks have unequal numbers of queries
    assert alike.low < alike.mean < alike.high
    large = np.mean([gain.mean() for gain in gains.values() if len(gain) > 16])
    assert difference(arm, bare, least=17).mean == pytest.approx(large) != pytest.approx(difference(arm, bare).mean)
    assert difference(arm, bare, ("flat-to-3d",)) is None


def test_the_interval_is_that_of_a_normal_of_the_same_width(made):
    """By the law of variances; 2,000 resamples know a quantile to about 5 % of the width, so 15 % is three of them."""
    arm = {seed: made("cocoa", seed, 1e-3, 0.5) for seed in (0, 1)}
    bare = {seed: made("bare", seed, 1e-3, 0.3) for seed in (0, 1)}
    variance = 0.0
    for name in arm[0].tasks:
        gains = np.mean([arm[s].tasks[name].hits.astype(float) - bare[s].tasks[name].hits for s in (0, 1)], axis=0)
        variance += gains.var() / len(gains) / len(arm[0].tasks) ** 2
    found = difference(arm, bare)
    assert found.high - found.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.15)


def test_other_queries_are_refused(made):
    one = made("cocoa", 0, 1e-3, 0.5)
    task = one.tasks["tile/test_seen"]
    other = dataclasses.replace(
        one, tasks={**one.tasks, "tile/test_seen": dataclasses.replace(task, hits=task.hits[1:])}
    )
    with pytest.raises(ValueError, match="other queries of tile/test_seen"):
        difference({0: one}, {0: other})


def test_means_over_seeds_and_chance(made):
    arm = {seed: made("cocoa", seed, 1e-3, 0.6) for seed in (0, 1)}
    mean, error = over_seeds(arm)
    both = [arm[0].mean(), arm[1].mean()]
    assert mean == pytest.approx(np.mean(both)) and error == pytest.approx(abs(both[0] - both[1]) / 2)
    assert over_seeds({0: arm[0]})[1] is None and chance(arm) == pytest.approx(0.02)
