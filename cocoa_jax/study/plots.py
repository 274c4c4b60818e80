"""Drawings of a study: scores and differences of a question's arms, and scores against compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoa_jax.study.compare import Difference, Seeds, chance, over_seeds

_IND, _OOD, _INK = "#2a7f7a", "#c26a2b", "#3c3733"


def draw_question(
    arms: Mapping[str, Seeds], names: Mapping[str, str], differences: Mapping[str, Difference | None], path: Path
) -> None:
    """Left the scores of each arm with a dot for every seed, right its difference from the first with its interval.

    Args:
        arms: pieces of each, the baseline first.
        names: what a reader is told of each arm.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.3 + 0.48 * len(arms)), layout="constrained")
    scores, gains = figure.subplots(1, 2, width_ratios=(1.25, 1), sharey=True)
    places = range(len(arms))
    for split, colour, shift, label in (("test_seen", _IND, -0.14, "IND"), ("test_unseen", _OOD, 0.14, "OOD")):
        for place, arm in zip(places, arms.values(), strict=True):
            values = [100 * result.mean(split) for result in arm.values()]
            scores.plot(values, [place + shift] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        middle = [100 * over_seeds(arm, split)[0] for arm in arms.values()]
        scores.plot(middle, [place + shift for place in places], "|", color=colour, markersize=13, mew=2.4, label=label)
        guess = 100 * chance(next(iter(arms.values())), split)
        scores.axvline(guess, color=colour, linestyle=":", linewidth=1.2)
    scores.set_yticks(list(places), [names[arm] for arm in arms])
    scores.set(xlabel="p@1, %, mean of the tasks (dots: seeds; dotted: chance)", xlim=(0, None))
    scores.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for place, name in enumerate(arms):
        found = differences.get(name)
        if found is not None:
            gains.plot([100 * found.low, 100 * found.high], [place, place], color=_INK, linewidth=1.6)
            gains.plot(100 * found.mean, place, "o", color=_INK, markerfacecolor=_INK if found.clear else "white")
    gains.axvline(0, color=_INK, linewidth=0.8)
    gains.set(xlabel="points above the first, 95 % over queries")
    gains.tick_params(axis="y", length=0)
    scores.set_ylim(len(arms) - 0.5, -0.5)
    _save(figure, (scores, gains), path)


def draw_compute(arms: Mapping[str, Seeds], names: Mapping[str, str], path: Path) -> None:
    """The mean of all tasks of every arm against the FLOPs that it spent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    marks = "osD^vP*Xhd<>"
    for number, (arm, pieces) in enumerate(arms.items()):
        mean, error = over_seeds(pieces)
        spent = next(iter(pieces.values())).flops / 1e12
        axis.errorbar(
            spent,
            100 * mean,
            yerr=None if error is None else 100 * error,
            fmt=marks[number % len(marks)],
            color=f"C{number % 10}",
            capsize=3,
            label=names[arm],
        )
    guess = 100 * chance(next(iter(arms.values())))
    axis.axhline(guess, color=_INK, linestyle=":", linewidth=1.2)
    axis.annotate("chance", (0.01, guess), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points")
    axis.set(
        xlabel="TFLOPs of all stages (counted)", ylabel="p@1, %, mean of all tasks", xlim=(0, None), ylim=(0, None)
    )
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, (axis,), path)


def _save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    import matplotlib

    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    # Without a salt the same drawing is another file every time.
    with matplotlib.rc_context({"svg.hashsalt": "study"}):
        figure.savefig(path, metadata={"Date": None})
