"""Whose folder it is: what may change between two commands of a run, and what a stage may change of the one before."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest

from cocoa_jax.checkpoints.convert import hf_to_orbax
from cocoa_jax.checkpoints.errors import CheckpointError, UnavailableCheckpointError
from cocoa_jax.config import SettingsError, TrainConfig, evaluate_config_of, parse, to_dict
from cocoa_jax.data.mixture import Mixture
from cocoa_jax.recipe import Recipe, read_recipe, stage_configs
from cocoa_jax.study.design import load_study, recipe_of
from cocoa_jax.training import folder
from cocoa_jax.training.folder import check_shared, open_parent, origin_of, prepare

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").rglob("*_2b.yaml"))
DATA = Mixture({}, {}, {"stage": "bridge", "datasets": {"a": {"contents": "0123"}}})


@pytest.fixture
def begun(stage_settings, backbone, tmp_path):
    """A run in tmp_path/run that began from tmp_path/from."""
    shutil.copytree(backbone, tmp_path / "from")
    config = parse(TrainConfig, stage_settings("bridge", tmp_path / "from", tmp_path / "run"))
    prepare(config, DATA, open_parent(config))
    return config


def again(config: TrainConfig, data: Mixture = DATA) -> None:
    prepare(config, data, open_parent(config))


def test_folders_may_move_and_what_a_run_does_not_need_may_be_gone(begun, tmp_path):
    again(begun)
    (tmp_path / "from").rename(tmp_path / "moved-from")
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = dataclasses.replace(begun, checkpoint=str(tmp_path / "moved-from"), output=str(tmp_path / "moved"))
    again(moved)
    assert origin_of(moved)["path"] == moved.checkpoint and len(origin_of(moved)["fingerprint"]) == 8
    shutil.rmtree(tmp_path / "moved-from")
    again(moved)
    parent = open_parent(moved)
    assert parent.side_files == tmp_path / "moved" / "backbone"
    with pytest.raises(ValueError, match="moved-from holds no config"):
        parent.load()
    with pytest.raises(CheckpointError, match="moved-from is not a folder"):  # a new run needs it
        open_parent(dataclasses.replace(moved, output=str(tmp_path / "new")))


def test_a_run_continues_where_the_checkpoints_before_it_made_room(trained, stage_settings, tmp_path, monkeypatch):
    before = Path(shutil.copytree(trained, tmp_path / "before"))
    config = parse(TrainConfig, stage_settings("contrastive", before, tmp_path / "run"))
    again(config)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "read_metadata", raising(UnavailableCheckpointError("no answer")))
        with pytest.raises(UnavailableCheckpointError):  # it may be there
            open_parent(config)
    shutil.rmtree(before / "checkpoints")
    again(config)
    before.rename(tmp_path / "moved")
    again(dataclasses.replace(config, checkpoint=str(tmp_path / "moved")))
    with pytest.raises(CheckpointError, match="moved/checkpoints holds no checkpoint"):  # a new run needs it
        open_parent(dataclasses.replace(config, checkpoint=str(tmp_path / "moved"), output=str(tmp_path / "new")))


def raising(error: Exception):
    def fail(*arguments):
        raise error

    return fail


@pytest.mark.parametrize("stopped", ["copied", "read"])
def test_nothing_stays_of_a_checkpoint_that_the_run_did_not_begin_from(begun, tmp_path, monkeypatch, stopped):
    """A first command with the wrong one ends in the middle; its files are taken back with the right one."""
    wrong = Path(shutil.copytree(begun.checkpoint, tmp_path / "wrong"))
    (wrong / "tokenizer_config.json").write_text((wrong / "tokenizer_config.json").read_text() + " ")
    right = dataclasses.replace(begun, output=str(tmp_path / "new"))
    parent = open_parent(dataclasses.replace(right, checkpoint=str(wrong)))
    with monkeypatch.context() as patch:
        if stopped == "copied":
            write = folder._write_whole
            patch.setattr(folder, "_write_whole", lambda path, it: path.name == "parent.json" or write(path, it))
        else:
            patch.setattr(type(parent), "origin", raising(KeyboardInterrupt()))
        with contextlib.suppress(KeyboardInterrupt):
            prepare(right, DATA, parent)
    again(right)
    for path in (tmp_path / "new" / "backbone").iterdir():
        if path.name == "cocoa.json":  # the run's own
            assert json.loads(path.read_text()) == to_dict(evaluate_config_of(to_dict(right)))
            continue
        assert path.read_bytes() == (Path(begun.checkpoint) / path.name).read_bytes()


@pytest.mark.parametrize("held", ["the checkpoint", "other weights", "a converted stage", "weights in a run"])
def test_a_backbone_that_no_run_brought_is_never_replaced(backbone, stage_settings, tmp_path, held):
    output, checkpoint = tmp_path / "run", backbone
    if held == "a converted stage":
        hf_to_orbax(backbone, output)
    else:
        shutil.copytree(backbone, output / "backbone")
    if held == "the checkpoint":  # in the folder that `cocoa init` is shown to make, with the stage's name forgotten
        checkpoint = output / "backbone"
    config = parse(TrainConfig, stage_settings("bridge", checkpoint, output))
    if held == "weights in a run":
        (output / "config.json").write_text(json.dumps(to_dict(config)))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match=r"run/backbone is not of a run of this folder .*: give another output"):
        again(config)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_stage_is_not_trained_into_its_own_folder(trained, stage_settings, tmp_path):
    stage = Path(shutil.copytree(trained, tmp_path / "stage"))
    with pytest.raises(SettingsError, match="output and checkpoint are both"):
        again(parse(TrainConfig, stage_settings("contrastive", stage, stage / ".." / "stage")))
    assert (stage / "backbone" / "config.json").exists()


def test_another_checkpoint_is_refused_by_both_fingerprints(begun, tmp_path):
    shutil.copytree(begun.checkpoint, tmp_path / "other")
    (weights,) = (tmp_path / "other").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    began, other = (open_parent(begun).fingerprint(), "")
    changed = dataclasses.replace(begun, checkpoint=str(tmp_path / "other"))
    other = open_parent(changed).fingerprint()
    with pytest.raises(SettingsError, match=rf"from .*/from \(fingerprint {began}\), .*/other has {other}: give"):
        again(changed)


def test_other_data_are_refused_by_both_contents(begun):
    other = Mixture({}, {}, {"stage": "bridge", "datasets": {"a": {"contents": "4567"}}})
    with pytest.raises(SettingsError, match=r"datasets\.a\.contents: '0123', '4567'"):
        again(begun, other)


def test_how_a_run_is_computed_may_change_but_not_its_precision(begun):
    compute = dataclasses.replace(begun.compute, remat="full", chunk_tokens=8, chunk_rows=2)
    again(dataclasses.replace(begun, compute=compute, data=dataclasses.replace(begun.data, workers=2)))
    with pytest.raises(SettingsError, match=r"compute\.dtype: 'float32', 'bfloat16'"):
        again(dataclasses.replace(begun, compute=dataclasses.replace(begun.compute, dtype="bfloat16")))


@pytest.mark.parametrize(
    ("before", "now", "name", "value", "refused"),
    [
        ("warmup", "bridge", "positions", "text_1d", True),
        ("warmup", "contrastive", "positions", "text_1d", True),
        ("bridge", "contrastive", "positions", "text_1d", True),
        ("warmup", "bridge", "mask_token", "<|im_start|>", True),
        ("warmup", "contrastive", "mask_token", "<|im_start|>", False),  # stage 3 hides nothing
        ("warmup", "bridge", "bridge_tokens", ("<|im_end|>", "Ā"), False),  # stage 1 has no bridge
        ("warmup", "contrastive", "bridge_tokens", ("<|im_end|>", "Ā"), False),
        ("bridge", "contrastive", "bridge_tokens", ("<|im_end|>", "Ā"), True),
        ("bridge", "contrastive", "bridge_tokens", ("<|im_start|>",), True),
        ("contrastive", "contrastive", "bridge_tokens", ("<|im_start|>",), True),
        ("bridge", "contrastive", "max_pixels", 4 * 784, False),
    ],
)
def test_what_the_stage_before_learned_otherwise_is_refused(stage_settings, before, now, name, value, refused):
    trained, config = (parse(TrainConfig, stage_settings(stage, "a", "b")) for stage in (before, now))
    processor = dataclasses.replace(config.data.processor, **{name: value})
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, processor=processor))
    stored = json.loads(json.dumps(to_dict(trained)))
    check_shared(config, stored, "a")
    if not refused:
        return check_shared(changed, stored, "a")
    mine, theirs = (repr(to_dict(one)["data"]["processor"][name]) for one in (changed, trained))
    told = f"data.processor.{name} is {mine}, and {theirs} in the stage '{before}' at runs/1 that this one begins from"
    with pytest.raises(SettingsError, match=re.escape(told)):
        check_shared(changed, stored, "runs/1")


def test_a_trained_stage_is_asked_for_what_it_learned(stage_settings, trained, tmp_path):
    settings = stage_settings("contrastive", trained, tmp_path / "run")
    assert open_parent(parse(TrainConfig, settings)).origin()["step"] == 1
    settings["data"]["processor"]["bridge_tokens"] = ["<|im_start|>"]
    told = re.escape("bridge_tokens is ['<|im_start|>'], and ['<|im_end|>']")
    with pytest.raises(SettingsError, match=told):
        open_parent(parse(TrainConfig, settings))


def check_all(recipe: Recipe) -> None:
    known = {  # no mixture is there to count its records
        name: {key: value for key, value in stage.items() if key != "epochs"} | {"loop": {"steps": 1}}
        for name, stage in recipe.stages.items()
    }
    configs = stage_configs(dataclasses.replace(recipe, stages=known))
    for before, now in itertools.pairwise(configs):
        check_shared(now, to_dict(before), before.output)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_stages_of_every_recipe_go_together(path):
    check_all(read_recipe(path))


def test_the_stages_of_every_arm_of_a_study_go_together():
    study = load_study("pictures")
    kept = [arm for arm in study.arms.values() if "processor" in str(arm.stages)]
    assert len(kept) >= 9  # several bridge tokens, longer texts
    for arm in kept:
        check_all(recipe_of(study, arm, 0, 1e-3))
