"""The parts of the report that show scores: the headline figures and the table with bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cocoa_jax.evaluation.charts import nice_ticks
from cocoa_jax.evaluation.markup import Child, Element, element

_BADGES = {"test_seen": "IND", "test_unseen": "OOD"}
_BADGE_MEANING = {
    "IND": "in distribution: things seen in training, drawn otherwise",
    "OOD": "out of distribution: things never seen",
}
_FRACTIONS = ("p_at_1", "hit_at_10", "chance", "untrained_p_at_1")


@dataclass(frozen=True)
class Score:
    """One task of results.json; all scores are fractions."""

    name: str
    meta_task: str
    badge: str
    queries: int
    candidates: int
    p_at_1: float
    hit_at_10: float
    chance: float
    untrained: float


def read_scores(results: Mapping[str, Any]) -> list[Score]:
    """The tasks of results.json by meta-task, then name, then split.

    Raises ValueError for a score that is not a fraction, KeyError for a missing entry.
    """
    scores = []
    for name, task in results["tasks"].items():
        for key in _FRACTIONS:
            if not 0.0 <= task[key] <= 1.0:
                raise ValueError(
                    f"task {name}: {key} is {task[key]}, expected a fraction from 0 to 1; divide percentages by 100"
                )
        split = str(task["split"])
        scores.append(
            Score(
                name=str(name),
                meta_task=str(task["meta_task"]),
                badge=_BADGES.get(split, split),
                queries=int(task["queries"]),
                candidates=int(task["candidates"]),
                p_at_1=float(task["p_at_1"]),
                hit_at_10=float(task["hit_at_10"]),
                chance=float(task["chance"]),
                untrained=float(task["untrained_p_at_1"]),
            )
        )
    return sorted(scores, key=lambda score: (score.meta_task, score.name, score.badge))


def headline(scores: Sequence[Score]) -> Element:
    """The means over tasks as large figures: all, in distribution, out of distribution."""
    groups = [("All tasks", list(scores))]
    groups += [
        (label, [score for score in scores if score.badge == badge])
        for badge, label in (("IND", "Seen things, new drawings"), ("OOD", "Things never seen"))
    ]
    figures = [_figure(label, group) for label, group in groups if group]
    return element("div", {"class": "figures"}, *figures)


def _figure(label: str, group: Sequence[Score]) -> Element:
    mean = _mean([score.p_at_1 for score in group])
    chance = _mean([score.chance for score in group])
    untrained = _mean([score.untrained for score in group])
    tasks = f"{len(group)} task{'s' if len(group) > 1 else ''}"
    return element(
        "div",
        {"class": "figure"},
        element("div", {"class": "label"}, label),
        element("div", {"class": "number"}, f"{100 * mean:.1f}", element("span", {"class": "unit"}, " %")),
        element("div", {"class": "note"}, f"mean precision@1 of {tasks}"),
        element("div", {"class": "note"}, f"untrained {100 * untrained:.1f} %, chance {100 * chance:.1f} %"),
    )


def score_table(scores: Sequence[Score]) -> Element:
    """Precision@1 as bars on one scale, with the untrained model and chance marked on the same bar."""
    top = max(max(score.p_at_1, score.untrained, score.chance) for score in scores)
    limit = min(1.0, next(limit for limit in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if top <= limit))
    heads = ("Task", "", "Precision@1, %", "P@1", "Untrained", "Chance", "Hit@10", "Queries", "Candidates")
    cells = [
        element("th", {"scope": "col", "class": "bars"}, head, _axis(limit))
        if place == 2
        else element(
            "th", {"scope": "col", "class": "" if place < 3 else "n"}, head or element("span", {"class": "sr"}, "Split")
        )
        for place, head in enumerate(heads)
    ]
    bodies = [
        _group(meta_task, [score for score in scores if score.meta_task == meta_task], limit)
        for meta_task in dict.fromkeys(score.meta_task for score in scores)
    ]
    caption = "Scores by meta-task. A bar is the trained model, a diamond the untrained one, an upright line chance."
    return element(
        "table",
        {"class": "scores"},
        element("caption", {"class": "sr"}, caption),
        element("thead", {}, element("tr", {}, *cells)),
        *bodies,
    )


def legend() -> Element:
    """What the signs of the table mean."""
    signs: list[Child] = [element("span", {"class": "key"}, element("i", {"class": "swatch"}), "trained")]
    signs.append(element("span", {"class": "key"}, element("i", {"class": "untrained"}), "untrained"))
    signs.append(element("span", {"class": "key"}, element("i", {"class": "chance"}), "chance"))
    signs += [
        element("span", {"class": "key"}, element("b", {"class": f"badge {badge.lower()}"}, badge), meaning)
        for badge, meaning in _BADGE_MEANING.items()
    ]
    return element("p", {"class": "legend"}, *signs)


def _group(meta_task: str, scores: Sequence[Score], limit: float) -> Element:
    mean = _mean([score.p_at_1 for score in scores])
    head = element(
        "tr",
        {"class": "group"},
        element("th", {"scope": "rowgroup", "colspan": "3"}, _heading(meta_task)),
        element("td", {"class": "n"}, f"{100 * mean:.1f}"),
        element("td", {"colspan": "5"}, "mean"),
    )
    return element("tbody", {}, head, *(_row(score, limit) for score in scores))


def _row(score: Score, limit: float) -> Element:
    numbers = (
        ("P@1", f"{100 * score.p_at_1:.1f}", "n strong"),
        ("untrained", f"{100 * score.untrained:.1f}", "n"),
        ("chance", f"{100 * score.chance:.1f}", "n"),
        ("hit@10", f"{100 * score.hit_at_10:.1f}", "n"),
        ("queries", f"{score.queries:,}", "n"),
        ("candidates", f"{score.candidates:,}", "n"),
    )
    badge = element(
        "span",
        {"class": f"badge {score.badge.lower()}", "title": _BADGE_MEANING.get(score.badge, "split")},
        score.badge,
    )
    return element(
        "tr",
        {},
        element("th", {"scope": "row"}, _spoken(score.name)),
        element("td", {"class": "split"}, badge),
        element("td", {"class": "bars"}, _bar(score, limit)),
        *(element("td", {"class": kind, "data-label": label}, text) for label, text, kind in numbers),
    )


def _bar(score: Score, limit: float) -> Element:
    def at(value: float) -> str:
        return f"{100 * value / limit:.2f}%"

    return element(
        "div",
        {"class": "bar", "aria-hidden": "true"},
        element("i", {"class": "swatch", "style": f"width:{at(score.p_at_1)}"}),
        element("i", {"class": "chance", "style": f"left:{at(score.chance)}"}),
        element("i", {"class": "untrained", "style": f"left:{at(score.untrained)}"}),
    )


def _axis(limit: float) -> Element:
    ticks = [tick for tick in nice_ticks(0, 100 * limit, 4) if tick <= 100 * limit + 1e-6]
    marks = [element("span", {"style": f"left:{tick / limit:.2f}%"}, f"{tick:.0f}") for tick in ticks]
    return element("span", {"class": "axis", "aria-hidden": "true"}, *marks)


def _spoken(name: str) -> str:
    """A task's name without the split that its badge already shows."""
    for split in _BADGES:
        for joint in "/-_. :":
            name = name.removesuffix(joint + split)
    return name.replace("_", " ")


def _heading(meta_task: str) -> str:
    return meta_task.upper() if len(meta_task) <= 3 else meta_task[:1].upper() + meta_task[1:]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
