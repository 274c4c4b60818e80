"""The plan of a study: every piece once, the first questions first, equal stages in one folder."""

import dataclasses
from pathlib import Path

import pytest

from cocoa_jax.config import SettingsError
from cocoa_jax.study.design import Arm, Piece, Question, Study, chain, load_study, pieces, recipe_of


def folders(study, arm, seed, rate, folder):
    return [config.output for config in chain(recipe_of(study, study.arms[arm], seed, rate), folder)[1]]


def test_the_search_comes_first_then_seed_by_seed(study):
    names = [piece.name for piece in pieces(study)]
    search = [f"search-{recipe}-{rate}" for recipe in ("bidirectional", "cocoa") for rate in ("0.001", "0.002")]
    assert names[:4] == search and len(names) == len(set(names))
    assert names[4:7] == ["bare-0", "cocoa-0", "longer-0"] and names[7:10] == ["bare-1", "cocoa-1", "longer-1"]
    assert names[10:] == ["cut-0", "cocoa-2", "cut-1", "cut-2"] or set(names[10:]) == {
        "cut-0", "cut-1", "cut-2", "cocoa-2"
    }  # fmt: skip


def test_only_some_questions(study):
    names = {piece.name for piece in pieces(study, ("late",))}
    assert names == {
        "search-cocoa-0.001",
        "search-cocoa-0.002",
        *(f"{a}-{s}" for a in ("cocoa", "cut") for s in range(3)),
    }
    with pytest.raises(SettingsError, match=r"\['nothing'\] do not exist"):
        pieces(study, ("nothing",))


def test_some_seeds_are_the_first_and_the_search_is_whole(study):
    assert [piece.name for piece in pieces(study, ("late",), 1)] == [
        *("search-cocoa-0.001", "search-cocoa-0.002"),
        *("cocoa-0", "cut-0"),
    ]
    assert pieces(study, seeds=3) == pieces(study)
    with pytest.raises(SettingsError, match="seeds 0: give 1 or more"):
        pieces(study, seeds=0)


def test_one_rate_needs_no_search(study):
    assert all(piece.rate is None for piece in pieces(dataclasses.replace(study, rates=(1e-3,))))


def test_equal_stages_are_shared(study, tmp_path):
    cocoa, other = folders(study, "cocoa", 0, 1e-3, tmp_path), folders(study, "cocoa", 0, 2e-3, tmp_path)
    assert len(cocoa) == 3 and cocoa[:2] == other[:2] and cocoa[2] != other[2]  # rates share what comes before
    assert folders(study, "cut", 0, 1e-3, tmp_path) == cocoa  # a width is of the reading, not of the training
    assert not set(cocoa) & set(folders(study, "cocoa", 1, 1e-3, tmp_path))  # seeds share nothing
    strict = Arm("cocoa", stages={"2-bridge": {"data": {"visibility": {"strict_bridge": True}}}})
    study = dataclasses.replace(study, arms={**study.arms, "strict": strict})
    own = folders(study, "strict", 0, 1e-3, tmp_path)
    reseeded = Arm("cocoa", stages={"2-bridge": {"seed": 9}})
    study = dataclasses.replace(study, arms={**study.arms, "reseeded": reseeded})
    assert folders(study, "reseeded", 0, 1e-3, tmp_path)[1] != cocoa[1]
    assert own[0] == cocoa[0] and own[1] != cocoa[1] and own[2] != cocoa[2]


def test_an_arm_lays_its_changes_over_the_studys_over_the_recipes(study):
    arm = Arm("cocoa", stages={"2-bridge": {"loop": {"steps": 7}}}, rate=0.5)
    recipe = recipe_of(study, arm, 2, 1e-3)
    assert recipe.stages["2-bridge"]["loop"]["steps"] == 7 and recipe.stages["3-contrastive"]["loop"]["steps"] == 10
    assert recipe.stages["2-bridge"]["masking" if "masking" in recipe.stages["2-bridge"] else "data"]
    assert recipe.stages["3-contrastive"]["optimizer"]["learning_rate"] == 5e-4
    assert recipe.init.backbone.width == 96 and recipe.init.backbone.seed == 2 and recipe.seed == 2
    wrong = Arm("bidirectional", stages={"1-warmup": {}})
    study = dataclasses.replace(study, arms={**study.arms, "wrong": wrong})
    with pytest.raises(
        SettingsError, match=r"arms \['wrong'\] change .*1-warmup.*bidirectional.*: choose among 3-contr"
    ):
        recipe_of(study, wrong, 0, 1e-3)


def test_an_arm_with_a_backbone_of_its_own_shares_nothing_and_changes_no_other(study, tmp_path):
    wide = Arm("cocoa", backbone={"width": 192})
    more = dataclasses.replace(study, arms={**study.arms, "wide": wide})
    recipe = recipe_of(more, wide, 1, 1e-3)
    assert recipe.init.backbone.width == 192 and recipe.init.backbone.layers == 1 and recipe.init.backbone.seed == 1
    (own, stages), (base, others) = (chain(recipe_of(more, more.arms[a], 1, 1e-3), tmp_path) for a in ("wide", "cocoa"))
    assert own != base and not {s.output for s in stages} & {s.output for s in others}
    assert (base, others) == chain(recipe_of(study, study.arms["cocoa"], 1, 1e-3), tmp_path)


def test_arms_must_be_described():
    with pytest.raises(SettingsError, match=r"\['b', 'c'\] are not described"):
        Study({}, {}, (1e-3,), {"a": Arm("cocoa", compute="c")}, {"q": Question("", ("a", "b"), 1)})
    with pytest.raises(SettingsError, match="rates is empty: give one"):
        Study({}, {}, (), {"a": Arm("cocoa")}, {"q": Question("", ("a",), 1)})
    with pytest.raises(SettingsError, match="questions name no arm: give a question"):
        Study({}, {}, (1e-3,), {"a": Arm("cocoa")}, {})


def test_pairs_are_of_the_arms_of_their_question():
    with pytest.raises(SettingsError, match=r"\['c'\], not among the arms \['a', 'b'\]"):
        Question("", ("a", "b"), 1, pairs=(("a", "c"),))
    pairs = load_study("pictures").questions["labelled-3"].pairs
    assert ("labelled-3-long", "labelled-3-only-long") in pairs  # equal compute


@pytest.mark.parametrize("name", ["pictures", "pictures-small", "pictures-large"])
def test_every_arm_of_the_studies_is_a_run(name, tmp_path):
    study = load_study(name)
    assert len(study.rates) > 1 and {Piece(arm, 0) for arm in study.arms} <= set(pieces(study))
    for arm in study.arms:
        assert chain(recipe_of(study, study.arms[arm], 0, 1e-3), tmp_path)[1][-1].stage == "contrastive"


def test_the_large_study_is_the_same_with_four_times_the_rows_and_twice_the_steps(tmp_path):
    study, large = load_study("pictures"), load_study("pictures-large")
    assert pieces(large) == pieces(study)
    assert large.backbone.keys() == study.backbone.keys() and large.backbone["width"] == 192
    for name, arm in study.arms.items():
        for one, other in zip(
            *(chain(recipe_of(s, s.arms[name], 0, 1e-3), tmp_path)[1] for s in (study, large)), strict=True
        ):
            assert other.batches().rows.batch_size == 4 * one.batches().rows.batch_size
            grown = tuple((4 * rows, *others) for rows, *others in one.data.rows.shapes)
            assert other.data.rows.shapes == grown, name
            assert other.loop.steps == 2 * one.loop.steps and other.compute.dtype == "bfloat16", name
        ratios = {key: large.arms[name].backbone[key] / large.backbone[key] for key in arm.backbone}
        assert all(ratio == 2 for ratio in ratios.values() if ratio != 1), name


def test_stages_keep_the_names_by_which_results_are_known():
    """The docs name stages of the study; a setting that is added must not give every stage another name."""
    study, folder = load_study("pictures"), Path("study")
    docs = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    for arm in ("cocoa", "no_warmup"):
        backbone, stages = chain(recipe_of(study, study.arms[arm], 0, 1.5e-3), folder)
        for name in (backbone.name, *(Path(stage.output).name for stage in stages if stage.stage != "contrastive")):
            assert name in docs, (arm, name)
