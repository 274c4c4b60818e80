"""The parts of the page of sets: bars of scores, histograms of cosines, retrievals; several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cocoa_jax.evaluation import set_gallery
from cocoa_jax.evaluation.charts import nice_ticks
from cocoa_jax.evaluation.markup import Child, Element, element
from cocoa_jax.evaluation.mmeb_sets import GROUPS, META_TASKS, PAPER_ROWS, PEERS, PUBLISHED
from cocoa_jax.evaluation.report_parts import gallery_part
from cocoa_jax.evaluation.set_tables import TITLES, Results, mean_text, percent

Runs = Mapping[str, Results]
PEER = "VLM2Vec-V2.0 2B"  # the peer that is marked on the bars: same backbone, same sets
_WIDTH, _HEIGHT, _FOOT = 220, 74, 14
_OPEN = 3  # retrievals of so many sets are unfolded at first


def by_set(runs: Runs) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Each set with what every run made of it, by meta-task."""
    names = dict.fromkeys(name for results in runs.values() for name in results["sets"])
    rows = [(name, [results["sets"].get(name) for results in runs.values()]) for name in names]
    order = {meta_task: place for place, meta_task in enumerate(META_TASKS)}
    return sorted(rows, key=lambda row: order.get(_any(row[1])["meta_task"], len(order)))


def headline(runs: Runs) -> Element:
    """The means as large figures, one of every run."""
    first = next(iter(runs.values()))["means"]
    groups = [group for group in ("all", "IND", "OOD") if first.get(group)]
    names = {"all": "All sets", "IND": "In distribution", "OOD": "Out of distribution"}
    figures = []
    for group in groups:
        numbers: list[Child] = [element("div", {"class": "label"}, names[group])]
        for place, (run, results) in enumerate(runs.items()):
            mean = results["means"].get(group)
            if mean is None:
                continue
            unit = element("span", {"class": "unit"}, f" % of {mean[1]} set{'s' if mean[1] > 1 else ''}")
            numbers.append(
                element("div", {"class": "number" if len(runs) == 1 else "number several"}, percent(mean[0]), unit)
            )
            if len(runs) > 1:
                numbers.append(element("div", {"class": "note"}, _dot(place), run))
        figures.append(element("div", {"class": "figure"}, *numbers))
    return element("div", {"class": "figures"}, *figures)


def legend(runs: Runs, peers: bool) -> Element:
    """What colours and signs mean."""
    keys: list[Child] = [element("span", {"class": "key"}, _dot(place), run) for place, run in enumerate(runs)]
    keys.append(element("span", {"class": "key"}, element("i", {"class": "whisker"}), "95 % bootstrap interval"))
    if peers:
        keys.append(element("span", {"class": "key"}, element("i", {"class": "untrained"}), f"{PEER}, as published"))
    for badge, meaning in (("IND", "its training set is among those of MMEB"), ("OOD", "it is not")):
        keys.append(
            element("span", {"class": "key"}, element("b", {"class": f"badge {badge.lower()}"}, badge), meaning)
        )
    return element("p", {"class": "legend"}, *keys)


def score_table(runs: Runs) -> Element:
    """A bar a run and set on one scale from 0 to 100 %, its interval on it, and what the rules say."""
    heads = ["Set", "", "Precision@1, %", "P@1", "Published rule", "Ties", "Hit@5", "Hit@10", "MRR", "Queries"]
    cells = []
    for place, head in enumerate(heads):
        kind = "bars" if place == 2 else "" if place < 3 else "n"
        shown: list[Child] = [head or element("span", {"class": "sr"}, "Split")]
        if place == 2:
            marks = [element("span", {"style": f"left:{tick:.0f}%"}, f"{tick:.0f}") for tick in nice_ticks(0, 100, 4)]
            shown.append(element("span", {"class": "axis", "aria-hidden": "true"}, *marks))
        cells.append(element("th", {"scope": "col", "class": kind}, *shown))
    rows = by_set(runs)
    bodies = []
    for meta_task in dict.fromkeys(_any(found)["meta_task"] for _, found in rows):
        members = [row for row in rows if _any(row[1])["meta_task"] == meta_task]
        title = TITLES.get(meta_task, meta_task)
        means = [results["means"].get(meta_task) for results in runs.values()]
        values = [percent(mean[0] if mean else None) for mean in means]
        there = next((f"mean of {mean[1]} of {mean[2]} sets" for mean in means if mean), "")
        group = element(
            "tr",
            {"class": "group"},
            element("th", {"scope": "rowgroup", "colspan": "3"}, title),
            _lines(values, "P@1", "n"),
            element("td", {"colspan": "6"}, there),
        )
        bodies.append(element("tbody", {}, group, *(_score_row(name, found) for name, found in members)))
    caption = element("caption", {"class": "sr"}, "Precision@1 by set and run")
    return element("table", {"class": "scores"}, caption, element("thead", {}, element("tr", {}, *cells)), *bodies)


def paper_table(runs: Runs) -> Element:
    """Means of the meta-tasks below those that others published."""
    heads = ["Model", *(TITLES.get(group, group) for group in GROUPS)]
    lines = [[model, *(f"{value:.1f}" for value in values)] for model, values in PAPER_ROWS.items()]
    ours = [[run, *(mean_text(results["means"].get(group)) for group in GROUPS)] for run, results in runs.items()]
    head = element(
        "tr", {}, *(element("th", {"scope": "col", "class": "n" if i else ""}, h) for i, h in enumerate(heads))
    )
    body = [_plain_row(line, "") for line in lines] + [_plain_row(line, "ours") for line in ours]
    table = element("table", {"class": "published"}, element("thead", {}, head), element("tbody", {}, *body))
    return element("div", {"class": "wide"}, table)


def histograms(runs: Runs) -> Element:
    """For every set and run: cosines of the best right candidates over those of the best wrong ones."""
    panels = []
    for name, found in by_set(runs):
        shown: list[Child] = [element("figcaption", {}, name)]
        for place, (run, result) in enumerate(zip(runs, found, strict=True)):
            if result is not None:
                label: list[Child] = [_dot(place)] if len(runs) > 1 else []
                shown += [_histogram(result["histograms"], f"cosines of {name}, {run}"), *label]
        panels.append(element("figure", {"class": "cosines"}, *shown))
    return element("div", {"class": "grid"}, *panels)


def retrievals(runs: Runs) -> list[Element]:
    """What was found, right and wrong, set by set; unfolded where the reader wants to look."""
    parts = []
    for number, (name, found) in enumerate(by_set(runs)):
        shown: list[Element] = []
        for place, (run, result) in enumerate(zip(runs, found, strict=True)):
            if result is None:
                continue
            if len(runs) > 1:
                shown.append(element("p", {"class": "run"}, _dot(place), f"{run}: {percent(result['p_at_1'])} %"))
            shown += gallery_part(set_gallery.shown(name, result["gallery"]))
        score = ", ".join(f"{percent(result['p_at_1'])} %" for result in found if result)
        title = element("summary", {}, element("b", {}, name), element("span", {"class": "note"}, f" {score}"))
        attributes = {"class": "set", **({"open": "open"} if number < _OPEN else {})}
        parts.append(element("details", attributes, title, *shown))
    return parts


def _any(found: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    return next(result for result in found if result is not None)


def _dot(place: int) -> Element:
    return element("i", {"class": f"dot run{place % 4}"})


def _score_row(name: str, found: Sequence[dict[str, Any] | None]) -> Element:
    one = _any(found)
    peer = PUBLISHED[name][PEERS.index(PEER)] / 100 if name in PUBLISHED else None
    bars = [_bar(place, result, peer) for place, result in enumerate(found)]
    badge = element("span", {"class": f"badge {one['split'].lower()}"}, one["split"])
    keys = (("P@1", "p_at_1"), ("rule", "argmax_p_at_1"), ("ties", "ties"), ("hit@5", "hit_at_5"),
            ("hit@10", "hit_at_10"), ("MRR", "mrr"), ("queries", "queries"))  # fmt: skip
    cells = []
    for label, key in keys:
        texts = [
            "-" if result is None else f"{result[key]:,}" if isinstance(result[key], int) else percent(result[key])
            for result in found
        ]
        cells.append(_lines(texts, label, "n strong" if key == "p_at_1" else "n"))
    return element(
        "tr",
        {},
        element("th", {"scope": "row"}, name),
        element("td", {"class": "split"}, badge),
        element("td", {"class": "bars"}, *bars),
        *cells,
    )


def _lines(texts: Sequence[str], label: str, kind: str) -> Element:
    return element("td", {"class": kind, "data-label": label}, *(element("div", {}, text) for text in texts))


def _bar(place: int, result: dict[str, Any] | None, peer: float | None) -> Element:
    parts: list[Child] = []
    if result is not None:
        low, high = result["p_at_1_interval"]
        parts.append(element("i", {"class": f"swatch run{place % 4}", "style": f"width:{100 * result['p_at_1']:.2f}%"}))
        style = f"left:{100 * low:.2f}%;width:{100 * max(high - low, 0.002):.2f}%"
        parts.append(element("i", {"class": "whisker", "style": style}))
    if peer is not None:
        parts.append(element("i", {"class": "untrained", "style": f"left:{100 * peer:.2f}%"}))
    return element("div", {"class": "bar", "aria-hidden": "true"}, *parts)


def _plain_row(cells: Sequence[str], kind: str) -> Element:
    first, *rest = cells
    head = element("th", {"scope": "row"}, first)
    return element("tr", {"class": kind}, head, *(element("td", {"class": "n"}, cell) for cell in rest))


def _histogram(counts: Mapping[str, Sequence[int]], title: str) -> Element:
    used = [i for kind in counts.values() for i, count in enumerate(kind) if count]
    bins = len(counts["right"])
    first, last = (max(0, min(used) - 1), min(bins - 1, max(used) + 1)) if used else (0, bins - 1)
    top = max(1, *(count for kind in counts.values() for count in kind))
    step = _WIDTH / (last - first + 1)
    nodes = [element("title", {}, title)]
    for kind in ("wrong", "right"):
        bars = [
            f"M{(i - first) * step:.1f} {_HEIGHT}v-{_HEIGHT * counts[kind][i] / top:.1f}h{step:.2f}V{_HEIGHT}z"
            for i in range(first, last + 1)
            if counts[kind][i]
        ]
        nodes.append(element("path", {"class": kind, "d": "".join(bars)}))
    nodes.append(element("line", {"class": "grid", "x1": 0, "x2": _WIDTH, "y1": _HEIGHT, "y2": _HEIGHT}))
    low, high = 2 * first / bins - 1, 2 * (last + 1) / bins - 1
    for at, value, kind in ((0, low, "start"), (_WIDTH, high, "end")):
        nodes.append(element("text", {"class": f"tick {kind}", "x": at, "y": _HEIGHT + _FOOT - 2}, f"{value:.2f}"))
    return element("svg", {"class": "histogram", "viewBox": f"0 0 {_WIDTH} {_HEIGHT + _FOOT}", "role": "img"}, *nodes)
