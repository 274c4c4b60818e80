"""Recipes: every file is a whole run, stages follow one another, and what is done is not done again."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from cocoa_jax import cli, recipe
from cocoa_jax.config import InitConfig, SettingsError, TrainConfig, load_config, load_mixture, named_config, to_dict
from cocoa_jax.data.sources import SourceError
from cocoa_jax.recipe import Recipe, is_done, read_recipe, run_recipe, stage_configs
from cocoa_jax.training.mesh import mesh_sizes

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


EVERYWHERE = {
    "data.visibility.attention": "bidirectional", "data.visibility.strict_bridge": False, "data.interleave": 1,
    "data.processor.positions": "mrope", "data.processor.mask_token": "<|mask|>",
    "data.processor.bridge_tokens": ["<|im_end|>"], "optimizer.learning_rate": 2e-5, "optimizer.schedule": "linear",
    "optimizer.b1": 0.9, "optimizer.b2": 0.999, "optimizer.eps": 1e-8, "optimizer.weight_decay": 0.0,
    "optimizer.clip": 1.0, "optimizer.head_rate": 1.0, "optimizer.ema": None,
    "lora.rank": 8, "lora.alpha": 64.0, "lora.dropout": 0.1, "lora.dora": True, "lora.dora_dropout": "peft",
    "lora.tokens": True, "lora.targets": [
        r"text\.layers\.attention\.[qkvo]_proj", r"text\.layers\.mlp\.(gate|up|down)_proj",
        r"vision\.layers\.attention\.qkv", r"vision\.layers\.mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)",
    ],
}  # fmt: skip
PAPER = {
    "warmup": {
        "loop.steps": 3000, "data.rows.batch_size": 128, "optimizer.warmup_steps": 100, "data.masking.shift": True,
        "data.masking.text_ratio": 0.2, "data.masking.image_ratio": 0.5, "data.masking.final_text_ratio": None,
        "data.masking.final_image_ratio": None, "warmup.mae_weight": 0.5, "warmup.noise": "unit", "data.negatives": 0,
    },
    "bridge": {  # two epochs of 6,400 records by 64
        "loop.steps": 200, "data.rows.batch_size": 64, "optimizer.warmup_steps": 100, "data.masking.shift": True,
        "data.masking.text_ratio": 0.7, "data.masking.image_ratio": 0.0, "data.masking.final_text_ratio": None,
        "data.masking.final_image_ratio": None, "data.processor.resolution": "square:448", "data.negatives": 0,
    },
    "contrastive": {
        "loop.steps": 2000, "data.rows.batch_size": 1024, "optimizer.warmup_steps": 200, "data.masking": None,
        "data.processor.resolution": "square:672", "contrastive.temperature": 0.02, "data.negatives": 0,
        "contrastive.first_temperature": None, "contrastive.symmetric": False, "contrastive.pooling": "bridge",
        "contrastive.tokens": "concatenated", "contrastive.widths": [], "contrastive.hardness": 0.0,
        "contrastive.false_negatives": False,
    },
}  # fmt: skip
FIRST_RESOLUTION = {"qwen2_vl_2b": "square:448", "qwen2_5_vl_3b": "square:336", "qwen2_5_vl_7b": "square:336"}
OTHERWISE = {
    ("causal", "contrastive"): {"data.visibility.attention": "causal"},
    ("moca", "warmup"): {
        "data.masking.text_ratio": 0.4, "data.masking.shift": False, "warmup.mae_weight": 0.1, "warmup.noise": "shared",
        "optimizer.learning_rate": 2e-6,
    },
    ("moca", "contrastive"): {
        "contrastive.temperature": 0.03, "data.negatives": 2, "optimizer.learning_rate": 2e-6,
    },
}  # fmt: skip


def flat(values: dict, prefix: str = "") -> dict:
    """Every setting by its whole name, groups of them too."""
    found = {prefix + name: value for name, value in values.items()}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
    return found


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_has_the_published_hyper_parameters(name, no_data):
    kind, backbone = name.split("_qwen")[0], "qwen" + name.split("_qwen")[1]
    for config in stage_configs(read_recipe(RECIPES / f"{name}.yaml")):
        wanted = EVERYWHERE | PAPER[config.stage] | OTHERWISE.get((kind, config.stage), {})
        if config.stage == "warmup":
            wanted["data.processor.resolution"] = FIRST_RESOLUTION[backbone]
        if kind == "moca":  # all weights are trained
            wanted = {key: value for key, value in wanted.items() if not key.startswith("lora.")} | {"lora": None}
        have = flat(to_dict(config))
        assert {key: have[key] for key in wanted} == wanted


# What a recipe has otherwise than the planned stage, of all that decides memory and time.
TALLER = [[32, 1280, 4096], [48, 1280, 4096]], [[32, 1280, 2304], [48, 1280, 2304]]
UNPLANNED = {
    # Texts of up to 512 tokens in place of 60: more rows where they are long, more hidden tokens in one of them.
    "warmup": {"data.rows.shapes": TALLER[0], "data.rows.masked_per_row": 256},
    "bridge": {"compute.chunk_rows": 1},  # nothing on 16 devices but where long texts take more rows
    # 672 x 672 pixels in place of 448 x 448: two pictures a row in place of four.
    "contrastive": {"data.rows.shapes": [[512, 1280, 4608], [768, 1280, 4608], [1024, 1280, 4608]]},
    "moca": {"data.rows.shapes": [[512, 1280, 4608], [1024, 1280, 4608], [2048, 1280, 4608]], "data.negatives": 2},
}


@pytest.mark.parametrize("name", LARGE)
def test_a_stage_is_computed_as_it_was_planned(name, no_data):
    """Against configs/pods, on the 16 devices of a v5e:4x4."""
    kind, larger = name.split("_qwen")[0], "qwen2_5" in name
    read = read_recipe(RECIPES / f"{name}.yaml")
    for folder, config in zip(read.stages, stage_configs(read), strict=True):
        pods = load_config(TrainConfig, named_config(f"pods/{folder}-{'lora' if config.lora else 'full'}.yaml"))
        have, planned = flat(to_dict(config)), flat(to_dict(pods))
        parts = [key for key in have if key.startswith(("compute.", "lora.", "data.rows.")) or key in (
            "lora", "data.threads", "data.workers", "data.decoded_mib", "data.negatives", "optimizer.ema")]  # fmt: skip
        wanted = dict(UNPLANNED["moca" if (kind, config.stage) == ("moca", "contrastive") else config.stage])
        if larger:  # no room for the products of all layers; stage 1 shows pictures of 336 x 336 pixels
            wanted["compute.remat"] = "full"
            wanted |= {"data.rows.shapes": TALLER[1]} if config.stage == "warmup" else {}
        assert {key: have[key] for key in parts if have[key] != planned[key]} == wanted
        assert mesh_sizes(config.mesh, 16) == mesh_sizes(pods.mesh, 16)


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


def test_the_stages_of_a_recipe_are_files(tmp_path, call):
    """For `cocoa train` and `cocoa plan`; where steps are given, no data are counted, nor needed."""
    name = RECIPES / "cocoa_qwen2_vl_2b.yaml"
    status, said, _ = call("run", name, "--write", tmp_path, "--steps", "3000,9375,2000")
    stages = stage_configs(read_recipe(name), (3000, 9375, 2000))
    assert status == 0 and len(stages) == 3
    assert [load_config(TrainConfig, path) for path in said.split()] == stages
    assert [stage.loop.steps for stage in stages] == [3000, 9375, 2000] and not Path(stages[0].output).exists()


def test_stages_of_a_run_in_a_bucket_are_files_and_are_not_run_here(tmp_path, call, monkeypatch):
    """The folders keep the two slashes of gs://, and nothing is made of that name here."""
    monkeypatch.chdir(tmp_path)
    given = ["run", RECIPES / "cocoa_qwen2_vl_2b.yaml", "--output", "gs://b/run", "--checkpoint", "base", "--data", "d"]
    status, said, _ = call(*given, "--steps", "3,4,5", "--write", "stages")
    assert status == 0
    stages = [load_config(TrainConfig, path) for path in said.split()]
    outputs = [f"gs://b/run/{Path(path).stem}" for path in said.split()]
    assert [stage.output for stage in stages] == outputs
    assert [stage.checkpoint for stage in stages] == ["base", *outputs[:-1]]
    mixture = load_mixture(stages[0].data.mixture)
    assert Path(stages[0].data.mixture).parent == Path("stages") and mixture.root == str(tmp_path / "d")
    status, said, told = call(*given, "--steps", "3,4,5")
    *_, told = told.splitlines()
    assert (status, said) == (1, "") and told.startswith("cocoa: output is gs://b/run, and a recipe is run by one")
    assert "--write" in told
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]


def test_a_recipe_is_not_run_by_several_processes(tiny, call, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    monkeypatch.setattr(recipe, "train", lambda config: pytest.fail("nothing is trained"))
    status, _, told = call("run", tiny)
    assert status == 1 and told.startswith("cocoa: this is one of several processes, and a recipe is run by one"), told


@pytest.mark.parametrize("hosts", ["told", "found"])
def test_a_process_of_several_makes_nothing_and_counts_no_data(on_words, mmeb_train, monkeypatch, hosts):
    """Whether its settings say so, or JAX alone, as on a pod outside of GKE."""
    others = {"processes": 2, "process": 1, "coordinator": "a:1"} if hosts == "told" else {}
    monkeypatch.setattr(jax, "process_count", lambda: 1 if others else 2)
    monkeypatch.setattr(recipe, "open_mixture", lambda mixture, stage: pytest.fail("nothing is counted"))
    stages = {name: {**stage, "epochs": 1} for name, stage in on_words.stages.items()}
    stages["contrastive"]["distributed"] = others
    begun = dataclasses.replace(on_words, stages=stages, data=str(mmeb_train.root), checkpoint=None, init=InitConfig())
    with pytest.raises(SettingsError, match="this is one of several processes, and a recipe is run by one process"):
        run_recipe(begun)
    assert not Path(begun.output).exists()


def test_stages_are_not_written_without_data_to_count(tmp_path, call):
    status, said, told = call(
        "run", RECIPES / "cocoa_qwen2_vl_2b.yaml", "--data", tmp_path, "--output", tmp_path, "--write", tmp_path / "new"
    )
    assert (status, said, (tmp_path / "new").exists()) == (1, "", False)
    assert told.endswith("; to write the stages without their data, give --steps of each stage\n"), told


@pytest.mark.parametrize("steps", ["10,x", "10,0", "", "3,-1", "1.5"])
def test_steps_that_are_none_are_one_line(steps, call):
    status, _, told = call("run", RECIPES / "pictures" / "no_bridge.yaml", "--steps", steps)
    assert (status, told) == (1, f"cocoa: --steps is {steps!r}: give a whole number from 1 for each stage, by commas\n")


def test_what_it_is_scored_on_is_looked_for_before_it_is_trained(tiny, monkeypatch, call, tmp_path):
    trained = []
    monkeypatch.setattr(recipe, "train", trained.append)
    values = yaml.safe_load(tiny.read_text())
    tiny.write_text(yaml.safe_dump({**values, "tasks": "mmeb-v1"}, sort_keys=False))
    status, _, told = call("run", tiny, "--evaluation_data", tmp_path / "nowhere")
    assert status == 1 and "36 of 36 sets are not in" in told and not trained
    status, said, told = call("run", tiny)
    assert status == 0 and said.startswith("done: ") and len(trained) == 2
    assert told == "cocoa: this run will not be scored: give --evaluation_data, the data of mmeb-v1\n"
    (tmp_path / "sets.yaml").write_text("sets: {a: {format: classes, path: a}}\n")
    assert recipe.scored_sets(dataclasses.replace(read_recipe(tiny), tasks=str(tmp_path / "sets.yaml"))).keys() == {"a"}


@pytest.fixture
def on_words(tiny, mmeb_train):
    """The recipe of ``tiny`` on words; its last stage draws from a data set that is not there."""
    gone = {**mmeb_train.config, "path": "gone.jsonl", "stages": ["contrastive"]}
    datasets = {"words": mmeb_train.config, "last": gone}
    (mmeb_train.root / "mixture.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    values = yaml.safe_load(tiny.read_text())
    for stage in values["stages"].values():
        stage["data"] = {**stage["data"], "kinds": {}, "mixture": str(mmeb_train.root / "mixture.yaml")}
    return dataclasses.replace(read_recipe(tiny), stages=values["stages"])


def test_the_data_of_all_stages_are_looked_for_before_the_first_is_trained(on_words, mmeb_train, monkeypatch):
    trained = []
    monkeypatch.setattr(recipe, "train", lambda config: trained.append(config.stage))
    with pytest.raises(SourceError, match=r"data set last: no file is called .*gone.jsonl"):
        run_recipe(on_words)
    monkeypatch.setattr(recipe, "is_done", lambda config: config.stage == "contrastive")
    run_recipe(on_words)  # what is done needs no data any more
    assert trained == ["bridge"]
    monkeypatch.setattr(recipe, "is_done", lambda config: False)
    shutil.copy(mmeb_train.root / "words.jsonl", mmeb_train.root / "gone.jsonl")
    run_recipe(on_words)
    assert trained == ["bridge", "bridge", "contrastive"]


def test_sets_of_ones_own_are_looked_for_before_the_first_stage_is_trained(tiny, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(recipe, "train", trained.append)
    (tmp_path / "things" / "hill").mkdir(parents=True)
    (tmp_path / "things" / "hill" / "1.png").write_bytes(b"not read")
    (tmp_path / "sets.yaml").write_text(
        "sets:\n  things: {format: classes, path: things}\n  fruit: {format: beir, path: fruit}\n"
    )
    with pytest.raises(SourceError, match=r"fruit: .*corpus.jsonl is not there: correct `path`"):
        run_recipe(dataclasses.replace(read_recipe(tiny), tasks=str(tmp_path / "sets.yaml")))
    assert not trained


def test_a_list_of_bad_records_of_other_data_is_refused_before_the_first_stage_is_trained(tiny, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(recipe, "train", trained.append)
    read = read_recipe(tiny)
    (tmp_path / "bad.json").write_text(json.dumps({"fingerprint": "0", "negatives": 0, "checked": {}, "bad": {}}))
    last = {**read.stages["contrastive"]}
    last["data"] = {**last["data"], "bad": {"known": str(tmp_path / "bad.json")}}
    with pytest.raises(ValueError, match=r"bad.json is about data 0, this is"):
        run_recipe(dataclasses.replace(read, stages={**read.stages, "contrastive": last}))
    assert not trained


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


def test_epochs_of_a_base_may_be_given_up_for_steps(tmp_path):
    (tmp_path / "stage.yaml").write_text("stage: bridge\nloop: {steps: 5, keep: 1}\n")
    (tmp_path / "base.yaml").write_text("output: a\ncheckpoint: c\nstages: {one: {from: stage.yaml, epochs: 2}}\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nstages: {one: {epochs: null, loop: {steps: 1000}}}\n")
    (read,) = read_recipe(tmp_path / "own.yaml").stages.values()
    assert read["loop"] == {"steps": 1000, "keep": 1} and read["epochs"] is None


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
