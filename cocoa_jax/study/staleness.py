"""Which pieces the study would make otherwise now: settings may have changed, and the rate that the search finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cocoa_jax.study.design import Piece, Study, arm_of, best_rate, chain, equal_steps, pieces, recipe_of, with_steps
from cocoa_jax.study.pieces import Result

REMEDY = "made with other settings or another rate than the study has now; remove their files to have them made again"


def stale(study: Study, results: Mapping[str, Result]) -> list[str]:
    """Names of pieces of the study whose last stage, or one before it, would now be another one.

    The rate is the best of the tries that are there. What a piece of equal compute has to spend is what that of the
    other arm did. How embeddings are read (width, number of queries) is no part of a stage and is not compared.

    Args:
        results: pieces by name.
    """
    means: dict[str, dict[float, float]] = {}
    for result in results.values():
        if result.search:
            means.setdefault(result.recipe, {})[result.rate] = result.mean()
    return [
        piece.name for piece in pieces(study) if piece.name in results and not _is_as_now(study, piece, results, means)
    ]


def _is_as_now(
    study: Study, piece: Piece, results: Mapping[str, Result], means: Mapping[str, Mapping[float, float]]
) -> bool:
    arm, result = arm_of(study, piece), results[piece.name]
    rate = piece.rate
    if rate is None:
        rate = study.rates[0] if len(study.rates) == 1 else best_rate(study.rates, means.get(arm.recipe, {}))
    if rate is None:  # nobody knows yet
        return True
    recipe = recipe_of(study, arm, piece.seed, rate)
    if arm.compute is not None:
        other = results.get(Piece(arm.compute, piece.seed).name, result)
        last = result.stages[-1]
        recipe = with_steps(
            recipe, equal_steps(other.flops, result.flops - last["flops"], last["flops"] / last["steps"])
        )
    return Path(chain(recipe, Path())[1][-1].output).name == result.made_of
