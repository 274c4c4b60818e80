"""Choosing tokens and visual units to hide: a function of (seed, step, example) and nothing else."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
from jaxtyping import Bool, Float64, Int32, UInt32


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """What to hide.

    Args:
        text_ratio: probability with which an ordinary token is hidden.
        image_ratio: probability with which a visual unit is hidden: any in stage 1, those of block B in stage 2.
        final_text_ratio, final_image_ratio: where the ratios end, which then move linearly over the run (ours); None
            keeps them as they are.
        shift: predict a token from the hidden state before it (MNTP), else from its own (masked language model).
    """

    text_ratio: float
    image_ratio: float
    shift: bool = True
    final_text_ratio: float | None = None
    final_image_ratio: float | None = None

    def __post_init__(self) -> None:
        ratios = {"text_ratio": self.text_ratio, "image_ratio": self.image_ratio}
        final = {"final_text_ratio": self.final_text_ratio, "final_image_ratio": self.final_image_ratio}
        for field, ratio in {**ratios, **final}.items():
            if ratio is not None and not 0 <= ratio <= 1:
                raise ValueError(f"{field} is {ratio}, a probability lies in 0..1: correct it")

    @property
    def hides_units(self) -> bool:
        """Whether visual units are hidden at any step."""
        return self.image_ratio > 0 or (self.final_image_ratio or 0) > 0

    def text_ratio_at(self, step: int, steps: int) -> float:
        """The text ratio of step ``step``, from 0, of a run of ``steps``: the first and the last at their ends."""
        return _between(self.text_ratio, self.final_text_ratio, step, steps)

    def image_ratio_at(self, step: int, steps: int) -> float:
        """The same for the image ratio."""
        return _between(self.image_ratio, self.final_image_ratio, step, steps)


def _between(first: float, last: float | None, step: int, steps: int) -> float:
    if last is None:
        return first
    share = min(step / max(steps - 1, 1), 1.0)
    return (1 - share) * first + share * last


class Purpose(enum.IntEnum):
    """Independent random streams of one example."""

    RECORD = 0
    TOKENS = 1
    UNITS = 2


def example_rng(seed: int, step: int, example: int, purpose: Purpose) -> np.random.Generator:
    """The generator of one purpose of the ``example``-th example of the global batch of ``step``."""
    return np.random.default_rng((seed, step, example, int(purpose)))


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """Hidden tokens of one example; m of them.

    Args:
        index: ascending positions inside the example.
        priority: the smallest are kept when there are more than a row can hold; below 0 is never given up first.
    """

    index: Int32[np.ndarray, " m"]
    priority: Float64[np.ndarray, " m"]


def choose_tokens(
    allowed: Bool[np.ndarray, " n"], rng: np.random.Generator, ratio: float, shift: bool, at_least_one: bool
) -> Choice:
    """Choose each allowed token with probability ``ratio``, each on its own.

    With ``shift`` the first token of an example has no predecessor to be predicted from and is never chosen.
    With ``at_least_one`` the token nearest to being chosen is chosen when no other is.
    """
    draw = rng.random(len(allowed))
    able = allowed.copy()
    if shift:
        able[:1] = False
    chosen = able & (draw < ratio)
    if at_least_one and able.any():
        first = int(np.argmin(np.where(able, draw, np.inf)))
        chosen[first] = True
        draw[first] = -1.0
    index = np.flatnonzero(chosen)
    return Choice(index.astype(np.int32), draw[index])


def within_budget(choice: Choice, budget: int) -> Int32[np.ndarray, " m"]:
    """The positions of an example of which a row can hide ``budget`` at most.

    Those with the greatest draws go, which is what a slightly smaller ratio would have chosen. An example alone
    decides: what is hidden in it must not depend on the examples that share its row.
    """
    kept = np.argsort(choice.priority, kind="stable")[:budget]
    return choice.index[np.sort(kept)]


def choose_units(
    units: int, rng: np.random.Generator, ratio: float, able: Bool[np.ndarray, " units"] | None = None
) -> tuple[Bool[np.ndarray, " units"], UInt32[np.ndarray, " units"]]:
    """Which of an example's stored units are hidden, and the seed of each one's noise.

    Args:
        able: the only ones that may be, of which one at least is, where there is any; None for all.
    """
    seeds = rng.integers(0, 2**32, size=units, dtype=np.uint32)
    draw = rng.random(units)
    chosen = draw < ratio
    if able is not None:
        chosen &= able
        if able.any():
            chosen[np.argmin(np.where(able, draw, np.inf))] = True
    return chosen, seeds
