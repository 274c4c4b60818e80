"""What all hosts of a run must hold alike; that they are told of it by real processes is in test_hosts."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from cocoa_jax.config import SettingsError, TrainConfig, differences, parse
from cocoa_jax.data.mixture import Mixture
from cocoa_jax.data.processor import Processor
from cocoa_jax.models.config import read_config
from cocoa_jax.training import agreement, loop
from cocoa_jax.training.agreement import check_alike, held_here, odd_ones
from cocoa_jax.training.folder import open_parent, prepare


@pytest.mark.parametrize(
    ("held", "odd"),
    [("aaaa", []), ("aaba", [2]), ("baaa", [0]), ("ab", [1]), ("abb", [0]), ("abc", [1, 2]), ("aabb", [2, 3])],
)
def test_who_is_odd(held, odd):
    assert odd_ones(held) == odd


def test_what_lies_elsewhere_on_another_host_may_and_what_makes_another_run_may_not(
    stage_settings, backbone, published, tmp_path
):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    sources = {"words": range(5)}

    def held(known="a", records=sources, contents="0123", checkpoint=backbone, files=backbone, model=None, **more):
        settings = stage_settings("bridge", checkpoint, tmp_path, **more)
        settings["data"]["bad"] = {"known": str(tmp_path / known)}
        config, mixture = parse(TrainConfig, settings), Mixture(records, {}, {"contents": contents})
        return held_here(config, mixture, Processor.load(files, model or read_config(files), config.data.processor))

    usual = held()
    assert json.loads(json.dumps(usual)) == usual
    assert held("b", distributed={"process": 1}, checkpoint="elsewhere") == usual
    seed, known, records, contents = held(seed=4), held("c"), held(records={"words": range(4)}), held(contents="4567")
    assert differences(usual, seed) == ["settings.seed: 3, 4"]
    assert differences(usual, records) == ["records.words: 5, 4"]
    assert differences(usual, contents) == ["data.contents: '0123', '4567'"]
    assert [one.partition(":")[0] for one in differences(usual, known)] == ["settings.data.bad.known"]
    model = read_config(backbone)
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, rope_theta=1.0))
    assert "model.text.rope_theta" in str(differences(usual, held(model=model)))
    tokens, pixels = held(files=published), shutil.copytree(backbone, tmp_path / "pixels")
    assert [one.partition(":")[0] for one in differences(usual, tokens)] == ["added tokens.<|mask|>"]
    settings = json.loads((pixels / "preprocessor_config.json").read_text())
    (pixels / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.2, 0.3]}))
    assert [one.partition(":")[0] for one in differences(usual, held(files=pixels))] == ["tokenizer and pixels"]


def test_a_run_continues_where_one_host_has_lost_its_first_checkpoint(stage_settings, published, tmp_path):
    """It reads the tokenizer that the run has, with the token that others add."""
    checkpoint = shutil.copytree(published, tmp_path / "backbone")
    config = parse(TrainConfig, stage_settings("bridge", checkpoint, tmp_path / "run"))
    mixture = Mixture({}, {}, {})

    def opened():
        parent = open_parent(config)
        processor = Processor.load(parent.side_files, parent.config, config.data.processor)
        return parent, processor, held_here(config, mixture, processor)

    parent, processor, held = opened()
    assert held["added tokens"] == dict(processor.added) != {}
    prepare(config, mixture, parent, processor.added)
    _, _, elsewhere = opened()
    shutil.rmtree(checkpoint)
    _, processor, here = opened()
    assert not processor.added and here == elsewhere


def test_hosts_wait_for_each_other_before_devices_do(monkeypatch):
    """A collective gives up after 30 s on some devices, and tables are opened as fast as a host's disk is."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "meet", lambda: asked.append("meeting"))

    def both(value):
        asked.append("collective")
        return np.stack([value, value])

    monkeypatch.setattr(agreement.multihost_utils, "process_allgather", both)
    check_alike({"seed": 3})
    assert asked == ["meeting", "collective", "collective"]


@pytest.mark.parametrize("name", ["example", "target_key", "image_key", "negative_key", "stats", "shape"])
def test_all_that_hosts_plan_counts_and_their_own_rows_do_not(name):
    batch = {key: np.arange(4) for key in ("example", "target_key", "image_key", "negative_key", "tokens")}
    other, stats = dict(batch), np.arange(3)
    other["tokens"] = batch["tokens"][: 3 if name == "shape" else 4] + 1
    if name in batch:
        other[name] = batch[name][::-1]
    same = agreement._checksum({**batch, "tokens": batch["tokens"] + 1}, stats)
    assert agreement._checksum(batch, stats) == same
    assert agreement._checksum(other, stats + (name == "stats")) != same


def test_a_step_that_hosts_planned_otherwise_is_not_saved(stage_settings, backbone, tmp_path, monkeypatch):
    """It is known one step late, as its metrics are."""
    dispatched = []
    monkeypatch.setattr(loop, "planned", lambda batch, stats, mesh, state: dispatched.append(1) or len(dispatched) - 1)

    def check(step, numbers, mesh):
        assert numbers == step
        if step == 1:
            raise SettingsError(f"known when {len(dispatched)} were dispatched")

    monkeypatch.setattr(loop, "check_planned", check)
    settings = stage_settings("bridge", backbone, tmp_path / "run", loop={"steps": 6, "checkpoint_every": 1})
    with pytest.raises(SettingsError, match="known when 2 were dispatched"):
        loop.train(parse(TrainConfig, settings))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
