"""The order of work, what is shared and removed, the search's choice, equal compute; training itself is left out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.embedder import Embedder
from cocoa_jax.evaluation.scorer import TIE
from cocoa_jax.study import planning, run
from cocoa_jax.study.design import Arm, Piece, pieces
from cocoa_jax.study.pieces import claimed, read_results, write_result
from cocoa_jax.study.planning import Planner, Work
from cocoa_jax.study.run import listing, run_study, score_tasks
from cocoa_jax.training.divergence import Diverged

PER_STEP = {"warmup": 2e9, "bridge": 1e9, "contrastive": 4e9}


class Killed(Exception):
    """In place of a signal."""


@pytest.fixture
def lab(monkeypatch, made):
    """Runs without training: a stage is done when its folder holds its lines, and scores come from the rate."""
    trained = []

    def train(config):
        folder = Path(config.output)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"seconds": 2.0}) + "\n")
        trained.append(folder.name)

    def is_done(config):
        return (Path(config.output) / "metrics.jsonl").exists()

    def score(work, queries):
        accuracy = 0.8 if work.stages[-1].optimizer.learning_rate == 2e-3 else 0.2
        return made(work.piece.arm, work.piece.seed, 0, accuracy, search=work.piece.rate is not None).tasks

    for module in (run, planning):
        monkeypatch.setattr(module, "is_done", is_done)
    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "score_tasks", score)
    monkeypatch.setattr(run, "_WAIT", 0.01)
    monkeypatch.setattr(run, "make_backbone_once", lambda *given: None)
    monkeypatch.setattr(Planner, "_step_flops", lambda self, config, recipe: PER_STEP[config.stage])
    return trained


def test_every_piece_is_made_and_no_stage_twice(lab, study, tmp_path):
    told = []
    run_study(study, tmp_path, (), True, told.append)
    results = read_results(tmp_path)
    assert results.keys() == {piece.name for piece in pieces(study)} and len(told) == len(results)
    told_done = [f"({done} of {len(results)} pieces done; time left: " in line for done, line in enumerate(told, 1)]
    assert all(told_done) and told[-1].endswith("time left: 0 minutes of one process)")
    assert len(lab) == len(set(lab))
    # Two rates for two recipes at seed 0, and what follows from the better one; two reconstruction stages a seed.
    assert sum(name.startswith("warmup") for name in lab) == 3 and sum(name.startswith("bridge") for name in lab) == 3
    assert (
        sum(name.startswith("contrastive") for name in lab) == 2 + 2 + 1 + 2 + 2
    )  # bare, cocoa, bare-1, cocoa-1, -2; longer
    assert {result.rate for result in results.values() if not result.search} == {2e-3}
    assert results["cut-0"].made_of == results["cocoa-0"].made_of


def test_arms_of_equal_compute_spend_what_their_model_does(lab, study, tmp_path):
    run_study(study, tmp_path, ("compute",), True, lambda line: None)
    results = read_results(tmp_path)
    longer, cocoa = results["longer-1"], results["cocoa-1"]
    assert abs(longer.flops - cocoa.flops) <= PER_STEP["contrastive"] / 2
    assert longer.stages[-1]["steps"] > cocoa.stages[-1]["steps"]


def test_what_an_arm_spent_before_its_last_stage_counts_too(lab, study, tmp_path):
    arms = {**study.arms, "longer": dataclasses.replace(study.arms["longer"], recipe="no_bridge")}
    planner = Planner(dataclasses.replace(study, arms=arms, rates=(1e-3,)), tmp_path)
    longer, cocoa = (planner.work(Piece(arm, 0)) for arm in ("longer", "cocoa"))
    assert len(longer.flops) == 2 and abs(sum(longer.flops) - sum(cocoa.flops)) <= PER_STEP["contrastive"] / 2


def test_a_stage_that_is_needed_again_is_not_removed(lab, study, tmp_path):
    run_study(study, tmp_path, (), False, lambda line: None)
    assert len(lab) == len(set(lab))


def test_a_killed_study_goes_on(lab, study, tmp_path, monkeypatch):
    whole, seen = run.train, []

    def killed(config):
        seen.append(config)
        if len(seen) == 6:
            raise Killed
        whole(config)

    monkeypatch.setattr(run, "train", killed)
    with pytest.raises(Killed):
        run_study(study, tmp_path, (), False, lambda line: None)
    before = read_results(tmp_path)
    assert before and "left  cocoa-1" in (shown := listing(study, tmp_path, ())) and "minutes of one process" in shown
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "pieces").iterdir()}
    run_study(study, tmp_path, (), False, lambda line: None)
    assert read_results(tmp_path).keys() == {piece.name for piece in pieces(study)}
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # what was done stays as it was
    count = len(pieces(study))
    assert f"{count} of {count} pieces done" in listing(study, tmp_path, ())


def test_scores_are_those_of_the_arms_width_and_of_tokens_compared_apart(
    backbone, stage_settings, leave_stage, tmp_path
):
    settings = stage_settings("contrastive", backbone, tmp_path / "stage", contrastive={"tokens": "max_sim"})
    settings["data"]["processor"]["bridge_tokens"] = ["<|im_end|>", "Ā"]
    stage = parse(TrainConfig, settings)
    embedder = Embedder.load(leave_stage(settings))
    piece, width, queries = Piece("cocoa", 0, 1e-3), 3, 12
    work = Work(piece, Arm("cocoa", width=width), 1e-3, None, backbone, (stage,), ())
    found = score_tasks(work, queries)
    tasks = run._tasks("validation")
    assert found.keys() == {task.name for task in tasks}

    def tokens(contents):
        rows = embedder.embed_contents(contents).reshape(len(contents), 2, -1)[..., :width]
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    for task in tasks:
        # By a loop: the mean over a query's tokens of the nearest of the candidate's, each cut by itself.
        right = [sorted(some) for some in task.relevant[:queries]]
        kept = sorted({index for some in right for index in some})
        asked, shown = tokens(task.queries[:queries]), tokens([task.candidates[index] for index in kept])
        near = np.array([[np.max(q @ c.T, axis=1).mean() for c in shown] for q in asked])
        is_right = np.array([[index in some for index in kept] for some in right])
        hits = np.where(is_right, near, -2).max(axis=1) > np.where(is_right, -2, near).max(axis=1) + TIE
        assert found[task.name].hits.tolist() == hits.tolist()
        assert found[task.name].chance == pytest.approx(is_right.mean())
        assert (found[task.name].candidates, found[task.name].split) == (len(kept), "validation")


def test_a_stale_piece_is_listed_and_made_again_when_its_file_is_removed(lab, study, tmp_path):
    only = ("steps",)
    run_study(dataclasses.replace(study, rates=(1e-3, 5e-4)), tmp_path, only, True, lambda line: None)
    study = dataclasses.replace(study, rates=(1e-3, 5e-4, 2e-3))  # the last is the best
    assert "stale" not in listing(study, tmp_path, only)
    run_study(study, tmp_path, only, True, lambda line: None)
    shown = listing(study, tmp_path, only)
    assert "stale cocoa-0\nstale " in shown and "done  search-cocoa-0.001\n" in shown and "\n4 stale pieces: " in shown
    for file in (tmp_path / "pieces").glob("cocoa-*"):
        file.unlink()
    assert "left  cocoa-0" in listing(study, tmp_path, only)
    run_study(study, tmp_path, only, True, lambda line: None)
    shown = listing(study, tmp_path, only)
    assert "done  cocoa-0" in shown and "stale bare-0" in shown and "\n2 stale pieces: " in shown


def test_checkpoints_go_when_no_piece_needs_them(lab, study, tmp_path):
    run_study(study, tmp_path, ("steps",), False, lambda line: None, 1)
    kept = {path.name for path in (tmp_path / "stages").iterdir()}  # what other questions and seeds begin from
    assert kept == Planner(study, tmp_path).needed([Piece("longer", 0), Piece("cut", 0)]) & set(lab) and kept
    run_study(study, tmp_path, (), False, lambda line: None)
    assert not list((tmp_path / "stages").iterdir()) and len(lab) == len(set(lab))
    # And stay as long as one does: the losers of a search go, the stages that they shared do not.
    tries = [Piece("cocoa", 0, rate) for rate in study.rates]
    planner = Planner(study, tmp_path / "more")
    needed = planner.needed([*tries, Piece("cut", 0)])
    assert len([name for name in needed if name.startswith("contrastive")]) == 2
    for one in tries:
        write_result(planner.folder, one.name, read_results(tmp_path)[one.name])
    assert len(planner.needed([Piece("cut", 0)])) == 3


def test_an_arm_that_diverges_is_left_out_and_named(lab, study, tmp_path, monkeypatch):
    whole, told = run.train, []

    def train(config):
        if config.stage == "contrastive" and config.loop.steps > 10:  # the longer arm
            raise Diverged("loss is nan")
        whole(config)

    monkeypatch.setattr(run, "train", train)
    run_study(study, tmp_path, ("compute",), False, told.append)
    for piece in ("longer-0", "longer-1"):
        assert any(line.startswith(f"{piece} left out: loss is nan; remove left_out/{piece} in") for line in told)
        assert (tmp_path / "left_out" / piece).is_file()
    assert {"cocoa-0", "cocoa-1"} <= read_results(tmp_path).keys()
    assert "out   longer-0" in listing(study, tmp_path, ("compute",))


def test_a_recipe_that_diverges_at_every_rate_ends_the_wait_for_its_own(lab, study, tmp_path, monkeypatch):
    whole, broken = run.train, set(study.rates)

    def train(config):
        if (config.stage == "warmup" and len(broken) > 1) or config.optimizer.learning_rate in broken:
            raise Diverged("loss is nan")
        whole(config)

    monkeypatch.setattr(run, "train", train)
    run_study(study, tmp_path, ("steps",), False, lambda line: None)
    assert not read_results(tmp_path)
    # One rate that does not is the one that is used.
    for file in (tmp_path / "left_out").iterdir():
        file.unlink()
    broken.clear()
    broken.add(2e-3)
    run_study(study, tmp_path, ("steps",), False, lambda line: None)
    assert Planner(study, tmp_path).rate("bidirectional") == 1e-3


def test_what_another_process_works_on_is_left_to_it(lab, study, tmp_path):
    planner = Planner(study, tmp_path)
    plan = pieces(study)
    work = planner.work(plan[0])
    with claimed(tmp_path, [work.folders[-1]]):
        assert run._make_one(planner, plan[:1]) is None
        assert run._make_one(planner, plan[:2]).startswith(plan[1].name)
    assert run._make_one(planner, plan[:1]).startswith(plan[0].name)


def test_a_piece_that_waits_for_its_rate_is_not_begun(lab, study, tmp_path):
    planner = Planner(study, tmp_path)
    assert planner.work(Piece("cocoa", 0)) is None and run._make_one(planner, [Piece("cocoa", 0)]) is None
    assert planner.rate("cocoa") is None and len(planner.possible(Piece("cocoa", 0))) == 2
    assert Planner(dataclasses.replace(study, rates=(5e-4,)), tmp_path).rate("cocoa") == 5e-4
