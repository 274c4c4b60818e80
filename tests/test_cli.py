"""The command: help with an example, and one clear line for whatever is wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from cocoa_jax import cli
from cocoa_jax.commands.command import Group


def names(verbs, before=()):
    """Every verb with the words that lead to it."""
    for name, verb in verbs.items():
        yield from names(verb.verbs, (*before, name)) if isinstance(verb, Group) else [(*before, name)]


COMMANDS = list(names(cli.commands()))


def assert_one_line(outcome: tuple[int, str, str], *words: str) -> None:
    status, said, told = outcome
    assert status not in (0, None) and not said
    assert told.count("\n") == 1 and told.startswith("cocoa: ") and "Traceback" not in told, told
    for word in words:
        assert word in told, told


def test_help_names_every_command(call):
    status, said, _ = call("--help")
    assert status == 0 and all(command[0] in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_a_command_says_what_it_does_with_an_example(call, command):
    status, said, _ = call(*command, "--help")
    assert status == 0 and f"example: cocoa {' '.join(command)} " in " ".join(said.split())
    assert said.split("\n\n")[1].strip()[:1].isupper()  # a sentence before the options


def test_the_command_as_it_is_installed(tmp_path):
    command = [sys.executable, "-c", "from cocoa_jax.cli import main; main()", "embed", "--checkpoint", "nowhere"]
    ended = subprocess.run([*command, "--input", "x", "--output", "y"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert [line for line in ended.stderr.splitlines() if line.startswith("cocoa: ")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["command", "demo", "train"]),
        (["teach"], ["teach"]),
        (["demo", "--scale", "huge"], ["huge", "small", "standard"]),
        (["demo", "--speed", "9"], ["--speed"]),
        (["evaluate", "--output", "x"], ["checkpoint"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--loop.stepps=3"], ["stepps"]),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(call, arguments, words):
    assert_one_line(call(*arguments), *words)


def test_an_unknown_key_in_a_file_is_one_line(call, stage_settings, tmp_path):
    settings = stage_settings("bridge", tmp_path, tmp_path / "run", colour="red")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert_one_line(call("train", "--config", tmp_path / "run.yaml"), "colour")


def test_settings_of_a_file_can_be_overridden(call, stage_settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(stage_settings("bridge", tmp_path, tmp_path / "run")))
    outcome = call("train", "--config", tmp_path / "run.yaml", f"--checkpoint={tmp_path / 'gone'}")
    assert_one_line(outcome, "gone is not a folder")


def test_an_error_shows_where_it_came_from_when_asked(stage_settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(stage_settings("bridge", tmp_path / "gone", tmp_path / "run")))
    with pytest.raises(ValueError, match="gone is not a folder"):
        cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--debug"])


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --checkpoint x --output gs://b/o",
        "evaluate --checkpoint x --output o --tasks gs://b/sets.yaml",
        "evaluate --checkpoint x --output o --tasks mmeb-v1 --data gs://b/eval",
        "embed --checkpoint x --input gs://b/items.jsonl --output o.npz",
        "embed --checkpoint x --input items.jsonl --output gs://b/o.npz",
        "probe --checkpoints x --output gs://b/o",
        "report --run gs://b/run",
        "report --evaluations o,gs://b/other",
        "report --evaluations o --output gs://b/both.html",
        "convert hf-to-orbax x gs://b/stage",
        "convert orbax-to-hf x gs://b/hub",
        "adapter export x gs://b/peft",
        "adapter merge x gs://b/merged",
        "adapter merge x merged --adapter gs://b/peft",
        "study pictures --output gs://b/study --list",
        "study report x --docs gs://b/docs",
        "data synthesize x --output gs://b/rows --endpoint.url y --endpoint.model z",
        "init --output gs://b/backbone --backbone.vocab_size=300",
        "run configs/recipes/cocoa_qwen2_vl_2b.yaml --steps 3,4,5 --write gs://b/stages",
        "run configs/recipes/cocoa_qwen2_vl_2b.yaml --steps 3,4,5 --data gs://b/MMEB-train",
        "run configs/recipes/cocoa_qwen2_vl_2b.yaml --steps 3,4,5 --evaluation_data gs://b/MMEB-eval",
        "plan --config configs/pods/1-warmup-lora.yaml --topology v5e:4x4 --cells gs://b/cells",
        "profile attention --topology v5e:1x1 --output gs://b/tables",
        "profile step --config configs/pods/1-warmup-lora.yaml --topology v5e:4x4 --report gs://b/report",
        "profile trace --config configs/demo/2-bridge.yaml --checkpoint=x --trace gs://b/trace",
        "profile masks --output gs://b/masks.svg",
    ],
)
def test_a_bucket_is_refused_where_only_a_path_of_this_machine_will_do(call, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert_one_line(call(*command.split()), "gs://b/", ": give a path of this machine")
    assert not list(tmp_path.iterdir())


def test_a_report_of_data_goes_to_no_bucket(call, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb, name in (("inspect", "page.html"), ("check", "bad.json")):
        command = ["data", verb, "--config", "configs/demo/2-bridge.yaml", f"--checkpoint={backbone}"]
        assert_one_line(call(*command, f"--output=gs://b/{name}"), f"output is gs://b/{name}", "on this machine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "embed"])
def test_a_checkpoint_that_is_none_is_one_line(call, tmp_path, command):
    (tmp_path / "items.jsonl").write_text('{"text": "a"}\n')
    more = {"embed": ["--input", tmp_path / "items.jsonl"], "evaluate": []}[command]
    (tmp_path / "empty").mkdir()
    for checkpoint, words in (("nowhere", "is not a folder"), ("empty", "config.json")):
        assert_one_line(call(command, "--checkpoint", tmp_path / checkpoint, "--output", tmp_path / "o", *more), words)


def test_the_report_of_a_run_that_is_none_is_one_line(call, tmp_path):
    assert_one_line(call("report", "--run", tmp_path / "nowhere"), "is not a folder")


def test_a_split_that_is_none_is_one_line(call, trained, tmp_path):
    outcome = call("evaluate", "--checkpoint", trained, "--output", tmp_path, "--splits", "test_seen,tomorrow")
    assert_one_line(outcome, "tomorrow", "test_unseen")


def test_a_taken_folder_is_one_line(call, tmp_path):
    (tmp_path / "mine.txt").write_text("here")
    assert_one_line(call("init", "--output", tmp_path, "--backbone.vocab_size=300"), str(tmp_path), "not empty")


def test_embed(call, trained, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": "a kiwi"}) + "\n" + json.dumps({"image": "gone.png"}))
    command = ["embed", "--checkpoint", trained, "--input", tmp_path / "items.jsonl", "--output", tmp_path / "out.npz"]
    assert_one_line(call(*command), "line 2", "gone.png")
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": "a kiwi"}))
    status, _, told = call(*command)
    assert status == 0, told
    assert np.load(tmp_path / "out.npz")["embeddings"].shape == (1, 32)
