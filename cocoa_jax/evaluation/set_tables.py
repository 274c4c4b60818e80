"""Scores of sets as Markdown, in the layout of the method's paper, beside what others published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cocoa_jax.evaluation.mmeb_sets import GROUPS, META_TASKS, PAPER_ROWS, PEERS, PUBLISHED, REMARKS, SETS
from cocoa_jax.evaluation.prompts_used import prompts_said
from cocoa_jax.evaluation.statistics import group_means

Results = Mapping[str, Any]
TITLES = {"classification": "Classification", "vqa": "VQA", "retrieval": "Retrieval", "grounding": "Grounding"}
TITLES |= {"all": "All"}


def means(scores: Mapping[str, float]) -> dict[str, tuple[float, int, int] | None]:
    """The mean of each group of MMEB, and over all sets that there are where they are others."""
    groups = GROUPS if all(name in SETS for name in scores) else {"all": list(scores)}
    return group_means(scores, groups)


def markdown(runs: Mapping[str, Results]) -> str:
    """One table of means and one of sets.

    Args:
        runs: results by what a run is called.
    """
    names = list(dict.fromkeys(name for results in runs.values() for name in results["sets"]))
    known = all(name in SETS for name in names)
    parts = ["# Precision@1, %", ""]
    if known:
        parts += _paper_table(runs)
    parts += ["", "## By data set", "", *_set_table(names, runs, PEERS if known else ())]
    parts += ["", "## How this was made", ""]
    for run, results in runs.items():
        parts += [f"- **{run}**: {line}" for line in said(results)]
    if known:
        parts += ["", "## To be read with it", "", *(f"- {remark}" for remark in REMARKS)]
    return "\n".join(parts) + "\n"


def said(results: Results) -> list[str]:
    """What a reader must know about a run beside its scores."""
    config, sets = results["config"], [result for result in results["sets"].values() if result]
    ties = sum(result["ties"] for result in sets)
    # Embeddings of before an upgrade are not made again; results of before do not tell.
    codes = sorted({code for result in sets for code in (result["code"], *result.get("embedded_by", ()))})
    read = "read as in training" if config["trained_here"] else "not trained here"
    if config["read_otherwise"]:
        usual = "trained" if config["trained_here"] else "by default"
        read = f"read otherwise than {usual} ({'; '.join(config['read_otherwise'])})"
    repeated = sum(result["repeated_right_candidates"] for result in sets)
    return [
        f"weights {config['weights']}, instructions {config['instructions']}, code {', '.join(codes)}; {read}.",
        f"{how_read(config['settings'])}.",
        *([prompts_said(config["prompts"])] if "prompts" in config else []),  # results of before have none
        f"{ties} ties between distinct contents, each a miss; {repeated} listed candidates show what the right one "
        "shows and are the right one.",
    ]


def how_read(settings: Mapping[str, Any]) -> str:
    """The limits of pixels and text, what tokens see, and what is embedded."""
    processor = settings["processor"]
    limits = [
        f"at {side} {f'{processor[name]:,}' if processor[name] else 'as many as the checkpoint says'}"
        for side, name in (("least", "min_pixels"), ("most", "max_pixels"))
    ]
    pixels = processor["resolution"] or f"of {' and '.join(limits)} pixels"
    seen = f"{settings['visibility']['attention']} attention, pooling {settings['pooling']}"
    return f"pictures {pixels}, texts of up to {processor['max_text_tokens']} tokens, {seen}"


def percent(value: float | None) -> str:
    """A fraction as it is printed."""
    return "-" if value is None else f"{100 * value:.1f}"


def mean_text(mean: tuple[float, int, int] | Sequence[Any] | None) -> str:
    """A mean in percent; over some of its sets, it says of how many."""
    if mean is None:
        return "-"
    value, there, wanted = mean
    return percent(value) + (f" ({there} of {wanted})" if there < wanted else "")


def _paper_table(runs: Mapping[str, Results]) -> list[str]:
    heads = ["Model", *(TITLES.get(group, group) for group in GROUPS)]
    lines = [_row(heads), _row(["---", *["---:"] * len(GROUPS)])]
    lines += [_row([model, *(f"{value:.1f}" for value in values)]) for model, values in PAPER_ROWS.items()]
    for run, results in runs.items():
        lines.append(_row([f"**{run}**", *(mean_text(results["means"][group]) for group in GROUPS)]))
    return lines


def _set_table(names: Sequence[str], runs: Mapping[str, Results], peers: Sequence[str]) -> list[str]:
    heads = ["Set", "Meta-task", ""]
    for run in runs:
        heads += [f"**{run}** [95 %]", "published rule", "ties", "hit@5", "hit@10", "MRR"]
    heads += peers
    lines = [_row(heads), _row(["---", "---", "---", *["---:"] * (len(heads) - 3)])]
    order = {meta_task: place for place, meta_task in enumerate(META_TASKS)}
    any_of = {name: next(r["sets"][name] for r in runs.values() if r["sets"].get(name)) for name in names}
    for name in sorted(names, key=lambda name: order.get(any_of[name]["meta_task"], len(order))):
        cells = [name, TITLES.get(any_of[name]["meta_task"], any_of[name]["meta_task"]), any_of[name]["split"]]
        for results in runs.values():
            cells += _cells(results["sets"].get(name))
        cells += [f"{value:.1f}" for value in PUBLISHED[name]] if peers else []
        lines.append(_row(cells))
    return lines


def _cells(result: Results | None) -> list[str]:
    if result is None:
        return ["-"] * 6
    low, high = result["p_at_1_interval"]
    return [
        f"{percent(result['p_at_1'])} [{percent(low)}, {percent(high)}]",
        percent(result["argmax_p_at_1"]),
        f"{result['ties']}",
        *(percent(result[key]) for key in ("hit_at_5", "hit_at_10", "mrr")),
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
