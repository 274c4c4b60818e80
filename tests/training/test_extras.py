"""What a run may leave beside its stage: an average of the weights, a trace, compiled programs, a W&B run."""

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import SettingsError, TrainConfig, parse
from cocoa_jax.models.lora import LoraConfig
from cocoa_jax.training import loop
from cocoa_jax.training.loop import Stopped, train
from cocoa_jax.training.weights_and_biases import WandbRun

STEPS = 4


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> str:
    """A folder of compiled programs that the runs here share: the setting under test."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def settings(backbone, stage_settings, compiled):
    def make(folder: Path, loop=None, **more):
        given = stage_settings("bridge", backbone, folder)
        run = {"steps": STEPS, "checkpoint_every": 2, "compilation_cache": compiled, **(loop or {})}
        optimizer = {"learning_rate": 1e-3, "warmup_steps": 1, **more}
        return parse(TrainConfig, {**given, "optimizer": optimizer, "loop": run})

    return make


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def recorded(folder: Path) -> list[int]:
    """The numbers of the steps that a run's trace holds."""
    (trace,) = (folder / "trace").rglob("*.xplane.pb")
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(trace)).planes for line in plane.lines]
    return [dict(event.stats)["step_num"] for line in lines for event in line.events if event.name == "train"]


@contextlib.contextmanager
def read_programs() -> Iterator[list[str]]:
    """Names what JAX counts of programs that were compiled before and are read from their folder."""
    found: list[str] = []

    def note(event: str, **more: object) -> None:
        found.extend([event] * (event == "/jax/compilation_cache/cache_hits"))

    jax.monitoring.register_event_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(note)


def stop_after(monkeypatch, steps: int) -> None:
    monkeypatch.setattr(loop, "_stop_requests", lambda: contextlib.nullcontext(lambda step: step + 1 == steps))


def test_a_stage_hands_on_the_average_and_goes_on_from_the_weights(settings, tmp_path, monkeypatch, compiled):
    before = jax.config.jax_compilation_cache_dir
    plain = train(settings(tmp_path / "plain"))
    averaged = train(settings(tmp_path / "averaged", ema=0.9))
    assert losses(averaged) == losses(plain)  # the average is looked at by nobody
    assert list(Path(compiled).iterdir()) and jax.config.jax_compilation_cache_dir == before
    with monkeypatch.context() as patch, read_programs() as read:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train(settings(tmp_path / "stopped", ema=0.9))
    assert read  # of the run before, whose settings are the same
    stopped = train(settings(tmp_path / "stopped", ema=0.9))
    assert losses(stopped) == losses(averaged)
    taken = [jax.tree.leaves(open_backbone(folder).load()) for folder in (plain, averaged, stopped)]
    assert all(map(np.array_equal, taken[1], taken[2])) and not all(map(np.array_equal, taken[0], taken[1]))


def test_an_adapter_is_averaged_too(settings, tmp_path):
    config = settings(tmp_path / "lora", ema=0.9, loop={"steps": 2})
    folder = train(dataclasses.replace(config, lora=LoraConfig(rank=2, alpha=4.0)))
    _, adapter = open_backbone(folder).adapter()
    b = adapter["text"]["layers"]["mlp"]["up_proj"]["b"]
    assert np.isfinite(b).all() and np.any(b)


def test_a_window_of_steps_is_recorded(settings, tmp_path):
    folder = train(settings(tmp_path / "run", loop={"profile": {"first": 1, "steps": 2}}))
    assert recorded(folder) == [1, 2]
    assert len(losses(folder)) == STEPS
    # What only says how a run is watched may change.
    assert train(settings(folder)) == folder


def test_a_window_is_closed_where_a_run_ends_in_it(settings, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        train(settings(tmp_path / "run", loop={"profile": {"first": 1, "steps": 9}}))
    assert recorded(tmp_path / "run") == [1]


@pytest.mark.parametrize("window", [{"first": -1}, {"first": 0, "steps": 0}])
def test_a_window_of_nothing_is_refused(settings, tmp_path, window):
    with pytest.raises(SettingsError, match=r"loop\.profile is"):
        settings(tmp_path, loop={"profile": window})


def test_wandb_that_is_not_installed_is_said_before_any_work(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"loop\.wandb is 'mine' and .* not installed: pip install '\.\[wandb\]'"):
        train(settings(tmp_path / "run", loop={"wandb": "mine"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # its client takes its time
def test_wandb_gets_every_step_once_and_a_continued_run_is_the_same_run(settings, tmp_path, monkeypatch):
    """Offline: the client writes its own file; what it is told is looked at on the way."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    told, write = [], WandbRun.write

    def noted(self, step, values):
        write(self, step, values)
        told.append((self._run.id, step, values["loss"]))

    monkeypatch.setattr(WandbRun, "write", noted)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(settings(tmp_path / "run", loop={"wandb": "mine"}))
    folder = train(settings(tmp_path / "run", loop={"wandb": "mine"}))
    name = (folder / "wandb-id.txt").read_text()
    assert told == [(name, step, loss) for step, loss in enumerate(losses(folder))]
    assert len(list((folder / "wandb").glob("offline-run-*"))) >= 1
