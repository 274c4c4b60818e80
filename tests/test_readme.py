"""What the README and the docs show is run: Python as it stands, commands through the real parser."""

import ast
import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml

from cocoa_jax import cli
from cocoa_jax.config import EvaluateConfig, TrainConfig, evaluate_config_of, load_config, to_dict
from cocoa_jax.recipe import read_recipe, stage_configs

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
# What stands behind a command in a line: a comment, or what the shell is to do besides.
BEHIND = re.compile(r"\s(#|&(?!&)|>).*$")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(path: Path) -> list[str]:
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", "").splitlines()]
    parts = [BEHIND.sub("", re.sub(r"\$\w+", "0", part).strip()) for line in lines for part in re.split("&&|;", line)]
    found = [part[part.index("cocoa ") :] for part in parts if re.match(r"(do )?(\w+=\S+ )?cocoa ", part)]
    # Stages that `cocoa run --write` makes first are read in tests/profiling/test_plan_commands.py.
    return sorted({one for one in found if "--config runs/" not in one})


def test_it_shows_every_command():
    assert {command.split()[1] for command in commands(README)} == set(cli.commands())


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_every_command_is_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = cli.build_parser(cli.commands(), "")
    for command in commands(path):
        assert parser.parse_args(shlex.split(command)[1:])["command"] == command.split()[1], command


def test_extras_are_those_of_the_package_in_the_clone():
    """The package is on no index: what is missing is installed from where it lies."""
    (line,) = re.findall(r"extras_require=(\{.*?\n    \})", (ROOT / "setup.py").read_text(), re.DOTALL)
    code = [*(ROOT / "cocoa_jax").rglob("*.py")]
    named = [re.findall(r"'\.\[([\w,]+)\]'", path.read_text()) for path in (README, *DOCS, *code)]
    assert {extra for found in named for some in found for extra in some.split(",")} <= set(ast.literal_eval(line))
    assert [path for path in (README, *DOCS, *code) if "cocoa-jax[" in path.read_text()] == []


def test_the_recipe_that_is_shown_is_one(call, tmp_path, monkeypatch):
    (text,) = [block for block in blocks(ROOT / "docs/recipes.md", "yaml") if block.startswith("# mine.yaml")]
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mixture.yaml").write_text("datasets: {mine: {format: cocoa-captions, path: captions.jsonl}}")
    line = json.dumps({"image_path": "1.jpg", "caption": "a kiwi"})
    (tmp_path / "captions.jsonl").write_text(f"{line}\n" * 100)
    monkeypatch.chdir(tmp_path)
    assert call("run", "mine.yaml", "--write", "stages")[0] == 0
    steps = {path.stem: yaml.safe_load(path.read_text())["loop"]["steps"] for path in Path("stages").iterdir()}
    assert steps == {"2-bridge": 2, "3-contrastive": 900}  # one epoch of 100 records in batches of 64


def test_the_recipe_for_two_slices_can_be_shared_by_them(call, tmp_path, monkeypatch):
    (text,) = [block for block in blocks(ROOT / "docs/training.md", "yaml") if block.startswith("# seven.yaml")]
    (tmp_path / "seven.yaml").write_text(text)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert call("run", "seven.yaml", "--write", "stages", "--steps", "3000,4688,2000")[0] == 0
    stages = [load_config(TrainConfig, path) for path in sorted(Path("stages").iterdir())]
    assert [config.stage for config in stages] == ["warmup", "bridge", "contrastive"]
    for config in stages:
        config.data.rows.check_shared(32, "devices")
        assert (config.compute.remat, config.mesh.fsdp, config.lora) == ("full", 16, None)


@pytest.mark.parametrize("kind", ["cocoa", "no_warmup", "no_bridge", "bidirectional", "causal", "moca"])
def test_the_settings_that_are_shown_read_as_a_recipe_trains(tmp_path, kind):
    (text,) = [block for block in blocks(ROOT / "docs/evaluation.md", "yaml") if block.startswith("# settings.yaml")]
    assert "\n# visibility:" in text
    (tmp_path / "settings.yaml").write_text(text.replace("# visibility", "visibility") if kind == "causal" else text)
    shown = load_config(EvaluateConfig, tmp_path / "settings.yaml")
    recipe = read_recipe(ROOT / f"configs/recipes/{kind}_qwen2_vl_2b.yaml")
    trained = evaluate_config_of(to_dict(stage_configs(recipe, (1,) * len(recipe.stages))[-1]))
    for field in ("processor", "visibility", "pooling", "tokens", "mesh"):
        assert getattr(shown, field) == getattr(trained, field), field
    assert shown.compute.dtype == trained.compute.dtype and shown.rows.widest[1:] == trained.rows.widest[1:]


def test_its_python_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save("kiwi.png")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/3-contrastive").symlink_to(trained)
    names: dict[str, np.ndarray] = {}
    for block in blocks(README, "python"):
        exec(block, names)
    assert names["rows"].dtype == np.float32
    np.testing.assert_allclose(np.diag(names["similarity"]), 1, atol=1e-5)
    assert names["similarity"][0, 1] < 1 - 1e-6  # two things, two embeddings
