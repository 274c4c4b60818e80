"""The page of an evaluation on sets, of one run or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cocoa_jax.evaluation import set_parts
from cocoa_jax.evaluation.markup import Child, Element, element
from cocoa_jax.evaluation.mmeb_sets import REMARKS, SETS
from cocoa_jax.evaluation.page import contents, document, section, write_whole
from cocoa_jax.evaluation.set_parts import Runs
from cocoa_jax.evaluation.set_tables import Results, said
from cocoa_jax.evaluation.sets import RESULTS

_NOTES = {
    "scores": "How often the nearest candidate is the right one. Equal candidates count once, a tie between different "
    "ones is a miss; the published rule, argmax with the right one first, stands beside it.",
    "published": "Unweighted means over sets. The rows above ours were copied from publications.",
    "cosines": "How near the best right candidate (filled) and the best wrong one (outlined) are to their query. "
    "The less they overlap, the fewer mistakes; where they stand says how much of the sphere is used.",
    "retrievals": "Up to three right and three wrong retrievals of every set, taken evenly over its queries: the query "
    "and the candidates nearest to it, nearest first, with their cosines.",
    "made": "What a reader must know before comparing these numbers with others.",
}


def read_runs(folders: Sequence[str | Path]) -> dict[str, Results]:
    """The results of evaluations by the names of their folders, or their paths where names are equal.

    Raises:
        ValueError: a folder that holds none.
    """
    runs: dict[str, Results] = {}
    paths = [Path(folder) for folder in folders]
    for path in paths:
        try:
            results = json.loads((path / RESULTS).read_text())
            if "sets" not in results:
                raise ValueError("no sets")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} holds no results of sets ({error}): give the output of `cocoa evaluate --tasks`"
            ) from error
        alone = sum(other.name == path.name for other in paths) == 1
        runs[path.name if alone else str(path)] = results
    return runs


def write_set_report(path: Path, runs: Runs) -> Path:
    """Writes the page, whole or not at all; returns its path."""
    write_whole(path, _page(runs))
    return path


def _page(runs: Runs) -> Element:
    names = list(dict.fromkeys(name for results in runs.values() for name in results["sets"]))
    known = all(name in SETS for name in names)
    sections = [
        section("scores", "Scores", _NOTES["scores"], [set_parts.legend(runs, known), set_parts.score_table(runs)])
    ]
    titles = ["Scores"]
    if known:
        sections.append(section("published", "Beside others", _NOTES["published"], [set_parts.paper_table(runs)]))
        titles.append("Beside others")
    sections.append(section("cosines", "Cosines", _NOTES["cosines"], [_cosine_legend(), set_parts.histograms(runs)]))
    sections.append(section("retrievals", "Retrievals", _NOTES["retrievals"], set_parts.retrievals(runs)))
    sections.append(section("made", "How it was made", _NOTES["made"], _made(runs, known)))
    titles += ["Cosines", "Retrievals", "How it was made"]
    title = "MMEB-V1" if known else "Sets of one's own"
    top: list[Child] = [
        element("p", {"class": "eyebrow"}, "CoCoA: multimodal embeddings"),
        element("h1", {}, f"{title}: {len(names)} set{'s' if len(names) > 1 else ''}"),
        element("ol", {"class": "summary"}, *(element("li", {}, line) for line in _summary(runs))),
        set_parts.headline(runs),
        contents(titles, sections),
    ]
    footer = element("footer", {}, element("p", {}, "This file is complete in itself and loads nothing."))
    return document(title, ["report.css", "sets.css"], top, sections, footer)


def _summary(runs: Runs) -> list[str]:
    lines = []
    for run, results in list(runs.items())[:3]:
        sets = [result for result in results["sets"].values() if result]
        queries, candidates = (sum(result[key] for result in sets) for key in ("queries", "candidates"))
        lines.append(f"{run}: {queries:,} queries and {candidates:,} distinct candidates in {len(sets)} sets.")
    return lines


def _made(runs: Runs, known: bool) -> list[Element]:
    lines = [f"{run}: {line}" for run, results in runs.items() for line in said(results)]
    lines += list(REMARKS) if known else []
    return [element("ul", {"class": "remarks"}, *(element("li", {}, line) for line in lines))]


def _cosine_legend() -> Element:
    names = (("right", "best right candidate"), ("wrong", "best wrong candidate"))
    keys = [element("span", {"class": "key"}, element("i", {"class": f"bin {kind}"}), name) for kind, name in names]
    return element("p", {"class": "legend"}, *keys)
