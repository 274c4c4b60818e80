"""Pieces that the study would make otherwise now are told from the others."""

import dataclasses

import pytest

from cocoa_jax.study.design import arm_of, chain, pieces, recipe_of
from cocoa_jax.study.staleness import stale


@pytest.fixture
def results(study, made, tmp_path):
    """Every piece as the study makes it; the lower rate is the better one."""
    found = {}
    for piece in pieces(study):
        arm, rate = arm_of(study, piece), piece.rate or 1e-3
        accuracy = 0.1 if rate > 1e-3 else 0.9
        result = made(piece.arm, piece.seed, rate, accuracy, search=piece.rate is not None, recipe=arm.recipe)
        last = chain(recipe_of(study, arm, piece.seed, rate), tmp_path)[1][-1]  # all spend the same in ten steps
        found[piece.name] = dataclasses.replace(result, made_of=last.output.split("/")[-1])
    return found


def names(results, *starts):
    return [name for name in results if name.startswith(starts)]


def test_what_the_study_makes_is_not_stale(study, results):
    assert stale(study, results) == []
    assert stale(dataclasses.replace(study, rates=(1e-3,)), results) == []  # without a search
    only = {name: result for name, result in results.items() if not result.search}
    assert stale(study, only) == []  # nobody knows their rate


def test_what_other_settings_made_is_stale(study, results):
    stages = {**study.stages, "2-bridge": {"loop": {"steps": 6}}}
    assert stale(dataclasses.replace(study, stages=stages), results) == names(results, "cocoa", "cut", "search-cocoa")


def test_a_better_rate_makes_the_arms_of_its_recipe_stale(study, results, made):
    tried = {**results, "search-cocoa-0.0005": made("cocoa", 0, 5e-4, 1.0, search=True)}
    more = dataclasses.replace(study, rates=(5e-4, *study.rates))
    assert stale(more, results) == []  # before it is tried
    assert stale(more, tried) == ["search-cocoa-0.0005", *names(results, "cocoa", "cut")]
    assert stale(study, tried) == []  # tried by hand, the study does not know it


def test_at_equal_compute_a_piece_is_stale_when_the_other_spends_something_else(study, results):
    for share, expected in ((1.04, []), (1.2, ["longer-0"])):  # of ten steps, half a one is no step more
        stage = {**results["cocoa-0"].stages[0], "flops": share * 2e12}
        spent = {**results, "cocoa-0": dataclasses.replace(results["cocoa-0"], stages=(stage,))}
        assert stale(study, spent) == expected
