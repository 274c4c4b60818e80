"""Settings: every file loads, nothing unknown passes, and a config survives being written down."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.config import (
    DistributedConfig,
    InitConfig,
    MeshConfig,
    OptimizerConfig,
    SettingsError,
    TrainConfig,
    differences,
    evaluate_config_of,
    load_config,
    named_config,
    parse,
    to_dict,
)

CONFIGS = Path(__file__).parent.parent / "configs"
OTHERS = {"recipes", "study"}  # see test_recipe and tests/study
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if not OTHERS.intersection(path.parts))


def kind_of(path: Path):
    return TrainConfig if "stage" in yaml.safe_load(path.read_text()) else InitConfig


def test_there_are_files():
    assert {path.stem for path in FILES} >= {"1-warmup", "2-bridge", "3-contrastive", "backbone"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads_and_survives_being_written_down(path):
    config = load_config(kind_of(path), path)
    written = json.loads(json.dumps(to_dict(config)))
    assert parse(kind_of(path), written) == config
    assert differences(written, to_dict(config)) == []
    if isinstance(config, TrainConfig):
        assert config.batches().stage == config.stage  # refuses settings that contradict each other
        assert config.data.split == "train"
        assert config.optimizer.warmup_steps < config.loop.steps


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_found_by_its_name(path):
    assert named_config(str(path.relative_to(CONFIGS))).read_text() == path.read_text()


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match=r"configs/demo/4\.yaml is not installed"):
        named_config("demo/4.yaml")


@pytest.fixture
def values(stage_settings, tmp_path):
    return stage_settings("bridge", tmp_path / "from", tmp_path / "to")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "stages", "bridge"),
        ("data", "kind", {"bridge": 1.0}),
        ("optimizer", "lr", 1e-3),
        ("loop", "step", 3),
        ("optimizer", "learning_rate", "fast"),
        ("", "stage", "pretraining"),
        ("data", "split", "test_unseen"),
        ("loop", "steps", 1.5),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused_by_name(values, tmp_path, section, key, value):
    place = values.setdefault(section, {}) if section else values
    place[key] = value
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SettingsError, match=key):
        load_config(TrainConfig, tmp_path / "run.yaml")


LEAST = {
    "loop": {"steps": 1, "checkpoint_every": 1, "keep": 1},
    "distributed": {"processes": 1, "heartbeat": 1, "start": 1, "process": 0},
    "data": {"threads": 0, "workers": 0, "decoded_mib": 0},
    "optimizer": {"warmup_steps": 0, "weight_decay": 0, "head_rate": 0},
}


DEMO = load_config(TrainConfig, named_config("demo/1-warmup.yaml"))


def with_value(config, section, name, value):
    part = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: part})


@pytest.mark.parametrize(
    ("section", "name", "least"), [(section, *item) for section, names in LEAST.items() for item in names.items()]
)
@given(distance=st.integers(1, 10**6))
def test_numbers_below_their_least_are_refused_by_name_and_value(section, name, least, distance):
    with_value(DEMO, section, name, least)
    with pytest.raises(SettingsError) as told:
        with_value(DEMO, section, name, least - distance)
    assert str(told.value) == f"{section}.{name} is {least - distance}: the least is {least}, give that or more"


def test_the_others_end_within_a_minute_where_a_process_dies():
    """By the heartbeat that all have who name none, which is the one that the table of exit statuses names."""
    told = (CONFIGS.parent / "docs/training.md").read_text()
    assert DistributedConfig().heartbeat == 20 and "within `distributed.heartbeat` (20 s)" in told
    given = [path for path in CONFIGS.rglob("*.yaml") if "heartbeat" in path.read_text()]
    assert not given


@pytest.mark.parametrize("name", ["learning_rate", "clip", "eps"])
@given(value=st.sampled_from([0.0, math.inf, math.nan]) | st.floats(-1e9, 0))
def test_rates_are_above_zero(name, value):
    with pytest.raises(SettingsError, match=f"optimizer.{name} is .*: give a number above 0"):
        OptimizerConfig(**{name: value})


def test_what_a_file_says_is_checked_too(values):
    values["loop"]["checkpoint_every"] = 0
    with pytest.raises(SettingsError, match=r"loop\.checkpoint_every is 0: the least is 1"):
        parse(TrainConfig, values)


def test_a_field_that_is_required_is_named(values):
    del values["loop"]["steps"]
    with pytest.raises(SettingsError, match="steps"):
        parse(TrainConfig, values)


@pytest.mark.parametrize("text", [None, "a: [", "- 1\n- 2"])
def test_a_file_that_is_no_settings_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SettingsError):
        load_config(TrainConfig, tmp_path / "run.yaml")


def test_a_trained_stage_is_read_as_it_was_trained(values):
    config = parse(TrainConfig, {**values, "mesh": {"data": 1, "fsdp": 8}})
    read = evaluate_config_of(json.loads(json.dumps(to_dict(config))))
    assert (read.processor, read.rows, read.visibility, read.compute, read.mesh) == (
        config.data.processor,
        config.data.rows,
        config.data.visibility,
        config.compute,
        MeshConfig(data=1, fsdp=8),
    )


def test_differences_name_fields_and_both_values(values):
    one = parse(TrainConfig, values)
    other = dataclasses.replace(one, seed=9, optimizer=dataclasses.replace(one.optimizer, clip=2.0))
    assert differences(to_dict(one), to_dict(other)) == ["optimizer.clip: 1.0, 2.0", "seed: 3, 9"]
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == ["a.b: 1, None", "a.c: None, 1"]
    assert differences({"a": {"b": 1}}, {"a": 1}) == ["a: {'b': 1}, 1"]
