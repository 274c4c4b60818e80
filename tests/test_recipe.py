"""Recipes: every file is a whole run, stages follow one another, and what is done is not done again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cocoa_jax import cli, recipe
from cocoa_jax.config import SettingsError, TrainConfig, load_config, named_config, to_dict
from cocoa_jax.recipe import Recipe, is_done, read_recipe, run_recipe, stage_configs

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
PICTURES = sorted(path.stem for path in (RECIPES / "pictures").glob("*.yaml"))
LARGE = sorted(path.stem for path in RECIPES.glob("*.yaml"))
STAGES = {
    "cocoa": ["warmup", "bridge", "contrastive"],
    "no_warmup": ["bridge", "contrastive"],
    "no_bridge": ["warmup", "contrastive"],
    "causal": ["contrastive"],
    "bidirectional": ["contrastive"],
    "moca": ["warmup", "contrastive"],
}


@pytest.fixture
def no_data(monkeypatch):
    """Mixtures as they are on a machine that has MMEB: 6,400 records."""
    monkeypatch.setattr(
        recipe, "open_mixture", lambda mixture, stage: type("Opened", (), {"sources": {"all": range(6400)}})
    )


def test_there_is_every_recipe_for_the_pictures_and_for_every_backbone():
    assert set(PICTURES) == set(STAGES)
    backbones = ("qwen2_vl_2b", "qwen2_5_vl_3b", "qwen2_5_vl_7b")
    assert set(LARGE) == {f"{name}_{backbone}" for name in STAGES for backbone in backbones}


@pytest.mark.parametrize("name", [f"pictures/{name}" for name in PICTURES] + LARGE)
def test_a_recipe_is_a_chain_of_stages(name, no_data):
    read = read_recipe(RECIPES / f"{name}.yaml")
    configs = stage_configs(read)
    kind = name.removeprefix("pictures/").split("_qwen")[0]
    assert [config.stage for config in configs] == STAGES[kind] and Path(read.output).name == Path(name).name
    before = read.checkpoint or f"{read.output}/backbone"
    for config in configs:
        assert config.checkpoint == before and config.batches().stage == config.stage
        before = config.output
    last = configs[-1]
    assert last.data.visibility.attention == ("causal" if kind == "causal" else "bidirectional")
    if kind == "moca":
        first = configs[0]
        assert (first.data.masking.text_ratio, first.data.masking.shift) == (0.4, False)
        assert (first.warmup.mae_weight, first.warmup.noise, last.contrastive.temperature) == (0.1, "shared", 0.03)
    elif configs[0].stage == "warmup":
        assert configs[0].data.masking.shift and configs[0].warmup.noise == "unit"


@pytest.mark.parametrize("backbone", ["qwen2_vl_2b", "qwen2_5_vl_3b", "qwen2_5_vl_7b"])
def test_the_method_has_the_papers_hyper_parameters(backbone, no_data):
    one, two, three = stage_configs(read_recipe(RECIPES / f"cocoa_{backbone}.yaml"))
    assert [c.loop.steps for c in (one, two, three)] == [3000, 200, 2000]  # two epochs of 6,400 records by 64
    assert [c.data.rows.batch_size for c in (one, two, three)] == [128, 64, 1024]
    assert [c.optimizer.warmup_steps for c in (one, two, three)] == [100, 100, 200]
    assert {
        (c.optimizer.learning_rate, c.optimizer.schedule, c.lora.rank, c.lora.alpha) for c in (one, two, three)
    } == {(2e-5, "linear", 8, 64)}
    side = 448 if backbone == "qwen2_vl_2b" else 336
    sizes = [c.data.processor.resolution for c in (one, two, three)]
    assert sizes == [f"square:{side}", "square:448", "square:672"]
    assert (one.data.masking.text_ratio, one.data.masking.image_ratio, one.warmup.mae_weight) == (0.2, 0.5, 0.5)
    assert two.data.masking.text_ratio == 0.7 and three.contrastive.temperature == 0.02


def test_the_demo_is_the_first_recipe_with_the_settings_of_its_files():
    configs = stage_configs(dataclasses.replace(read_recipe(RECIPES / "pictures" / "cocoa.yaml"), output="x", seed=2))
    before = "backbone"
    for config in configs:
        name = Path(config.output).name
        file = load_config(TrainConfig, named_config(f"demo/{name}.yaml"))
        expected = dataclasses.replace(file, checkpoint=f"x/{before}", output=f"x/{name}", seed=file.seed + 2000)
        assert config == expected
        before = name
    shorter = stage_configs(read_recipe(RECIPES / "pictures" / "cocoa.yaml"), (10, 10, 80))
    assert [(c.loop.steps, c.optimizer.warmup_steps) for c in shorter] == [(10, 5), (10, 5), (80, 15)]


@pytest.fixture
def tiny(backbone, stage_settings, tmp_path) -> Path:
    """A recipe of two short stages on the tiny backbone."""
    stages = {}
    for stage in ("bridge", "contrastive"):
        settings = stage_settings(stage, Path("x"), Path("y"), loop={"steps": 3, "checkpoint_every": 1})
        stages[stage] = {key: value for key, value in settings.items() if key not in ("checkpoint", "output")}
    values = {"output": str(tmp_path / "run"), "checkpoint": str(backbone), "tasks": None, "stages": stages}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path / "tiny.yaml"


KILLED = """
import os, signal, sys
from cocoa_jax import recipe
from cocoa_jax.training.metrics import MetricsWriter
from cocoa_jax.training import loop
write = MetricsWriter.write
def write_or_die(self, step, metrics, load):
    write(self, step, metrics, load)
    if "bridge" in str(self._path) and step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
loop.MetricsWriter.write = write_or_die
recipe.run_recipe(recipe.read_recipe(sys.argv[1]))
"""


def test_a_killed_recipe_goes_on_in_the_stage_it_was_in(tiny, monkeypatch, capsys):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tiny)], env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    run = tiny.parent / "run"
    assert (run / "bridge").is_dir() and not (run / "contrastive").exists()
    trained: list[str] = []
    train = recipe.train
    monkeypatch.setattr(recipe, "train", lambda config: trained.append(config.stage) or train(config))
    cli.main(["run", str(tiny)])
    assert trained == ["bridge", "contrastive"] and "done: " in capsys.readouterr().out
    assert all(map(is_done, stage_configs(read_recipe(tiny))))
    steps = [json.loads(line)["step"] for line in (run / "bridge" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    trained.clear()
    assert run_recipe(read_recipe(tiny)) is None and not trained
    longer = stage_configs(read_recipe(tiny), (3, 4))
    assert not is_done(longer[1])
    with pytest.raises(SettingsError, match="made with other settings"):
        run_recipe(read_recipe(tiny), (3, 4))


def test_epochs_are_counted_in_the_data_and_the_data_may_lie_elsewhere(mmeb_train, backbone, stage_settings, tmp_path):
    settings = stage_settings("contrastive", Path("x"), Path("y"))
    settings = {key: value for key, value in settings.items() if key not in ("checkpoint", "output", "loop")}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"datasets": {"words": mmeb_train.config}}))
    settings["data"] = {**settings["data"], "kinds": {}, "mixture": str(tmp_path / "mixture.yaml")}
    one = Recipe(str(tmp_path / "run"), {"only": {**settings, "epochs": 3}}, checkpoint=str(backbone), tasks=None)
    one = dataclasses.replace(one, data=str(mmeb_train.root))
    (config,) = stage_configs(one)
    assert config.loop.steps == 8  # 3 epochs of 20 records, 8 a step
    assert Path(config.data.mixture) == tmp_path / "run" / "mixture.yaml"
    assert yaml.safe_load(Path(config.data.mixture).read_text())["root"] == str(mmeb_train.root.resolve())


@pytest.fixture
def mmeb_train(tmp_path):
    """Twenty pairs of words, in a folder of their own."""
    root = tmp_path / "elsewhere"
    root.mkdir()
    lines = [json.dumps({"a": f"word {i}", "b": f"other {i}"}) for i in range(20)]
    (root / "words.jsonl").write_text("\n".join(lines) + "\n")
    columns = {"query_text": "a", "target_text": "b"}
    config = {"format": "table", "path": "words.jsonl", "columns": columns}
    return type("Made", (), {"root": root, "config": config})


def test_files_are_merged_over_their_bases(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "stage.yaml").write_text("stage: bridge\nseed: 7\ncheckpoint: gone\nloop: {steps: 5, keep: 1}\n")
    (tmp_path / "deep" / "base.yaml").write_text(
        "output: a\ncheckpoint: c\nstages:\n  one: {from: ../stage.yaml, seed: 8}\n  two: {seed: 1}\n"
    )
    (tmp_path / "own.yaml").write_text("base: deep/base.yaml\noutput: b\nstages: {one: {epochs: 2}, two: null}\n")
    read = read_recipe(tmp_path / "own.yaml")
    assert read.output == "b" and read.checkpoint == "c"
    assert read.stages == {"one": {"stage": "bridge", "seed": 8, "loop": {"keep": 1}, "epochs": 2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "holds a list"),
        ("output: a\nstages: {one: {seed: 1}}\n", "begins with one of them"),
        ("output: a\ncheckpoint: b\nstages: {}\n", "stages is empty"),
        ("output: a\ncheckpoint: b\ncolour: red\nstages: {one: {seed: 1}}\n", "colour"),
        ("base: nowhere.yaml\n", "nowhere.yaml cannot be read"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SettingsError, match=words):
        read_recipe(tmp_path / "bad.yaml")


def test_a_recipe_survives_its_own_writing():
    configs = stage_configs(read_recipe(RECIPES / "pictures" / "moca.yaml"))
    assert json.loads(json.dumps(to_dict(configs[0]))) == to_dict(configs[0])
