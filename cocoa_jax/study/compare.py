"""What the pieces of two arms say about each other: means over seeds, and a paired bootstrap over queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from cocoa_jax.evaluation.statistics import RESAMPLES, interval
from cocoa_jax.study.pieces import Result, mean_of

Seeds = Mapping[int, Result]
"""The pieces of an arm by their seed."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean of p@1 less that of the baseline, over the seeds that both have.

    Args:
        low, high: the middle 95 % of a bootstrap over queries, the same drawn for both.
        error: standard error over seeds; None for one seed.
    """

    mean: float
    low: float
    high: float
    seeds: int
    error: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def over_seeds(arm: Seeds, split: str | None = None, meta_task: str | None = None) -> tuple[float, float | None]:
    """Mean over seeds of the mean over tasks, and its standard error, None for one seed."""
    return _mean_and_error([result.mean(split, meta_task) for result in arm.values()])


def chance(arm: Seeds, split: str | None = None, meta_task: str | None = None) -> float:
    """What guessing would reach in the same mean."""
    result = next(iter(arm.values()))
    return mean_of({name: task.chance for name, task in result.tasks.items()}, result, split, meta_task)


def difference(
    arm: Seeds,
    baseline: Seeds,
    tasks: Collection[str] | None = None,
    by_query: bool = False,
    least: int = 0,
    seed: int = 0,
) -> Difference | None:
    """An arm against its baseline; None where they have no seed or none of the tasks in common.

    Queries are drawn anew within every task, the same for both arms and for all seeds. The interval says how far other
    queries of these tasks could move the difference; how far other seeds could, the standard error says.

    Args:
        tasks: names of tasks, without their split; None for all.
        by_query: whether every query counts alike, and not every task.
        least: queries that a task must have to count.

    Raises:
        ValueError: pieces that were scored on other queries.
    """
    gains = [_gains(arm[one], baseline[one], tasks, least) for one in sorted(arm.keys() & baseline.keys())]
    if not gains or not gains[0]:
        return None
    queries = {name: len(gain) if by_query else 1 for name, gain in gains[0].items()}
    shares = {name: count / sum(queries.values()) for name, count in queries.items()}
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for name, share in shares.items():
        gain = np.mean([of_seed[name] for of_seed in gains], axis=0)
        drawn = rng.integers(len(gain), size=(RESAMPLES, len(gain)))
        means += gain[drawn].mean(axis=1) * share
    low, high = interval(means)
    of_seeds = [sum(float(one[name].mean()) * share for name, share in shares.items()) for one in gains]
    mean, error = _mean_and_error(of_seeds)
    return Difference(mean, low, high, len(gains), error)


def _gains(
    arm: Result, baseline: Result, tasks: Collection[str] | None, least: int
) -> dict[str, Float[np.ndarray, " Q"]]:
    gains = {}
    for name, task in arm.tasks.items():
        if len(task.hits) < least or (tasks is not None and name.split("/")[0] not in tasks):
            continue
        other = baseline.tasks.get(name)
        if other is None or len(other.hits) != len(task.hits):
            raise ValueError(f"{arm.arm} and {baseline.arm} were scored on other queries of {name}: make them again")
        gains[name] = task.hits.astype(float) - other.hits
    return gains


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(np.mean(values)), error
