"""Tables and plots of a study between two marks of a page; what they mean is for people to write around them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cocoa_jax.study.compare import Difference, Seeds, chance, difference, over_seeds
from cocoa_jax.study.design import Question, Study, best_rate
from cocoa_jax.study.pieces import Result, read_results, write_json
from cocoa_jax.study.plots import draw_compute, draw_question
from cocoa_jax.study.staleness import REMEDY, stale

PAGE, FOLDER = "results.md", "study"
BEGIN, END = "<!-- study: tables and plots, written by `cocoa study report` -->", "<!-- study: end -->"
_NEW = f"""# Results

## What holds and what does not

<!-- To be written by a person who has read the tables below. -->

{BEGIN}
{END}
"""
_COLUMNS: tuple[tuple[str, str | None, str | None], ...] = (
    ("classification", None, "classification"),
    ("VQA", None, "vqa"),
    ("retrieval", None, "retrieval"),
    ("grounding", None, "grounding"),
    ("IND", "test_seen", None),
    ("OOD", "test_unseen", None),
    ("all", None, None),
)

SIDES = {
    "words and pictures": (
        "caption-to-picture",
        "picture-to-caption",
        "keyword",
        "emoji-category",
        "clip-art-category",
        "scenery",
    ),
    "picture to picture": ("flat-to-3d", "3d-to-flat"),
    "picture and words to picture": ("skin-tone", "tile"),
}
"""Tasks of the pictures by what their queries and candidates are."""

LEAST = 100
"""Queries of a task that counts where small ones do not: one of 17 moves a mean over tasks as much as 45 of 771."""


def write_report(study: Study, run: Path, docs: Path) -> Path:
    """Write ``results.md`` and, in ``study``, plots and pieces; what stands around the marks stays.

    Args:
        run: folder of a study, or of nothing but its pieces.
        docs: where both go.

    Raises:
        ValueError: there are no pieces, or one is damaged, or the page has lost one of its marks.
    """
    results = read_results(run)
    if not results:
        raise ValueError(f"{run} holds no pieces: make some by `cocoa study pictures --output {run}`")
    plots = docs / FOLDER
    plots.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        write_json(plots / f"{name}.json", result)
    page = docs / PAGE
    text = page.read_text() if page.exists() else _NEW
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} must hold {BEGIN!r} and {END!r} once, in this order: put them back")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    aside = page.with_suffix(".partial")
    aside.write_text(f"{before}{BEGIN}\n\n{tables(study, results, plots)}\n{END}{after}")
    os.replace(aside, page)
    return page


def tables(study: Study, results: Mapping[str, Result], plots: Path) -> str:
    """All questions of which there is anything, and the rates that were found, as Markdown; draws the plots."""
    arms = by_arm(results)
    parts = [_origin(study, results), _rates(study, results)]
    compared = {
        name: arm for q in study.questions.values() if q.wave == 0 for name in q.arms if (arm := arms.get(name))
    }
    if compared:
        draw_compute(compared, _names(study, compared), plots / "against-compute.svg")
        parts.append(f"![score against compute]({FOLDER}/against-compute.svg)\n")
    for name, question in study.questions.items():
        if sum(arm in arms for arm in question.arms) > 1:  # one arm answers nothing
            parts.append(_question(study, name, question, arms, plots))
    if compared:
        parts.append(_tasks(study, compared))
    return "\n".join(part for part in parts if part)


def by_arm(results: Mapping[str, Result]) -> dict[str, dict[int, Result]]:
    """The pieces of every arm by seed, without those of the search."""
    arms: dict[str, dict[int, Result]] = {}
    for result in results.values():
        if not result.search:
            arms.setdefault(result.arm, {})[result.seed] = result
    return {name: dict(sorted(seeds.items())) for name, seeds in arms.items()}


def _question(study: Study, name: str, question: Question, arms: Mapping[str, Seeds], plots: Path) -> str:
    there = {arm: arms[arm] for arm in question.arms if arm in arms}
    first = question.arms[0]
    against = {arm: difference(there[arm], arms[first]) if arm != first and first in arms else None for arm in there}
    draw_question(there, _names(study, there), against, plots / f"{name}.svg")
    guess = next(iter(there.values()))
    head = [column for column, _, _ in _COLUMNS]
    lines = [
        _row(["", *head, "steps", "TFLOPs", "seeds"]),
        _row(["---"] * (len(head) + 4)),
        _row(["chance", *(_percent(chance(guess, s, m)) for _, s, m in _COLUMNS), "", "", ""]),
    ]
    for arm, seeds in there.items():
        result = next(iter(seeds.values()))
        steps = " + ".join(str(stage["steps"]) for stage in result.stages)
        scores = [_with_error(*over_seeds(seeds, split, meta)) for _, split, meta in _COLUMNS]
        spent = [steps, f"{result.flops / 1e12:.3g}", str(len(seeds))]
        lines.append(_row([study.arms[arm].about or arm, *scores, *spent]))
    missing = [arm for arm in question.arms if len(arms.get(arm, ())) < question.seeds]
    note = f"\nNot all of its {question.seeds} seeds are there for: {', '.join(missing)}.\n" if missing else ""
    plot = f"![{question.about}]({FOLDER}/{name}.svg)"
    sides = _sides(
        _names(study, there), arms, [*((arm, first) for arm in there if arm != first), *question.pairs], first
    )
    return f"### {question.about}\n\n" + "\n".join(lines) + f"\n{note}{sides}\n{plot}\n"


def _sides(names: Mapping[str, str], arms: Mapping[str, Seeds], pairs: Sequence[tuple[str, str]], first: str) -> str:
    """Where the differences of pairs come from: from the first arm, or of two that the question names."""
    lines = []
    for pair in pairs:
        arm, other = (arms.get(name, {}) for name in pair)
        found = [
            difference(arm, other),
            *(difference(arm, other, tasks) for tasks in SIDES.values()),
            difference(arm, other, least=LEAST),
            difference(arm, other, by_query=True),
        ]
        if any(found):
            less = "" if pair[1] == first else f" **less** {names[pair[1]]}"
            lines.append(_row([f"{names[pair[0]]}{less}", *map(_gain, found)]))
    if not lines:
        return ""
    head = ["less the first", "all", *SIDES, f"tasks of {LEAST} queries or more", "every query alike"]
    return "\n" + "\n".join([_row(head), _row(["---"] * len(head)), *lines]) + "\n"


def _tasks(study: Study, arms: Mapping[str, Seeds]) -> str:
    """Every task by itself, for the arms of the first wave."""
    some = next(iter(next(iter(arms.values())).values()))
    lines = [
        _row(["task", "queries", "of", "chance", *(study.arms[arm].about or arm for arm in arms)]),
        _row(["---"] * (4 + len(arms))),
    ]
    for name, task in some.tasks.items():
        scores = [_percent(_mean(seeds, lambda r: float(r.tasks[name].hits.mean()))) for seeds in arms.values()]  # noqa: B023
        lines.append(_row([name, str(len(task.hits)), str(task.candidates), _percent(task.chance), *scores]))
    return "### Task by task\n\np@1 in %, means over the seeds that are there.\n\n" + "\n".join(lines) + "\n"


def _origin(study: Study, results: Mapping[str, Result]) -> str:
    """Which versions of the program the pieces come from, and which are stale."""
    versions = Counter(result.code for result in results.values())
    made = ", ".join(f"`{code}` ({count})" for code, count in versions.most_common())
    old = stale(study, results)
    return f"{len(results)} pieces by the program's versions {made}; {len(old)} are stale{_which(old)}.\n"


def _which(old: Sequence[str]) -> str:
    return f" ({REMEDY}): {', '.join(old)}" if old else ""


def _rates(study: Study, results: Mapping[str, Result]) -> str:
    tries = [result for result in results.values() if result.search]
    if not tries:
        return ""
    rates = sorted({result.rate for result in tries})
    found: dict[str, dict[float, float]] = {}
    for result in tries:
        found.setdefault(result.recipe, {})[result.rate] = result.mean()
    guess = _percent(chance({0: tries[0]}))  # all are tried on the same tasks
    lines = [
        _row(["recipe", *(f"{rate:g}" for rate in rates), "chosen"]),
        _row(["---"] * (2 + len(rates))),
        _row(["chance", *[guess] * len(rates), ""]),
    ]
    for recipe, means in found.items():
        best = max(means.values())
        cells = [_bold(_percent(means[rate]), means[rate] == best) if rate in means else "" for rate in rates]
        lines.append(_row([recipe, *cells, _chosen(means, study.rates)]))
    words = (
        "Mean p@1 in % over the validation tasks at each learning rate of stage 3, seed 0; the best is used everywhere."
        " Where it is the lowest or the highest that was tried, a better one may lie beyond."
    )
    return f"### The learning rates\n\n{words}\n\n" + "\n".join(lines) + "\n"


def _chosen(means: Mapping[float, float], rates: Sequence[float]) -> str:
    """The rate that a recipe's arms are given, whether it is an edge, and tries that are not there."""
    best = best_rate(rates, means)
    if best is None:
        return "none"
    edges = {min(means): "the lowest tried", max(means): "the highest tried"} if len(means) > 1 else {}
    edge = f" (**{edges[best]}**)" if best in edges else ""
    missing = ", ".join(f"{rate:g}" for rate in rates if rate not in means)
    return f"{best:g}{edge}" + (f"; without {missing}" if missing else "")


def _names(study: Study, arms: Mapping[str, Seeds]) -> dict[str, str]:
    return {arm: study.arms[arm].about or arm for arm in arms}


def _mean(seeds: Seeds, value: Callable[[Result], float]) -> float:
    return sum(map(value, seeds.values())) / len(seeds)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f}"


def _with_error(mean: float, error: float | None) -> str:
    return _percent(mean) if error is None or mean != mean else f"{100 * mean:.1f} ± {100 * error:.1f}"


def _gain(found: Difference | None) -> str:
    if found is None:
        return ""
    error = "" if found.error is None else f", se {100 * found.error:.1f}"
    text = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}{error})"
    return _bold(text, found.clear)
