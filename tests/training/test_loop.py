"""The trainer: killed or asked to stop, the same command gives the same run; errors name what is wrong."""

import contextlib
import functools
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto.event_pb2 import Event

from cocoa_jax import cli
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.orbax import StageCheckpoints, read_metadata
from cocoa_jax.config import SettingsError, TrainConfig, parse
from cocoa_jax.data.packing import PackingError
from cocoa_jax.data.processor import Processor
from cocoa_jax.training import loop
from cocoa_jax.training.divergence import Diverged
from cocoa_jax.training.inputs import open_batches, open_sources
from cocoa_jax.training.loop import STOPPED, Stopped, train
from cocoa_jax.training.metrics import MetricsWriter

STEPS = 8
CLOCK = ("seconds", "tflops_per_second", *(f"{what}_per_second" for what in ("pictures", "examples", "tokens")))
WORKER = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The same program runs again and again here, in other processes too: keep what was compiled."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    names = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as patch:
        before = {name: getattr(jax.config, name) for name in names}
        for name, value in names.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def settings_in(backbone, stage_settings):
    """Settings of a short stage 2 in a folder: settings_in(folder, **changes)."""

    def make(folder: Path, **more):
        given = stage_settings("bridge", backbone, folder)
        return {**given, "loop": {"steps": STEPS, "checkpoint_every": 3}, **more}

    return make


def records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    """What TensorBoard is told, by step and name; a record is its length, a checksum, itself and a checksum."""
    (file,) = (folder / "tensorboard").iterdir()
    data, found = file.read_bytes(), dict[int, dict[str, float]]()
    while data:
        end = 12 + struct.unpack("<Q", data[:8])[0]
        event = Event.FromString(data[12:end])
        for value in event.summary.value:
            found.setdefault(event.step, {})[value.tag] = value.simple_value
        data = data[end + 4 :]
    return found


@pytest.fixture(scope="module")
def finished(settings_in, tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "2-bridge"
    assert train(parse(TrainConfig, settings_in(folder))) == folder
    return folder


def test_a_run_leaves_metrics_and_a_stage(finished, backbone):
    lines = records(finished)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert lines[0].keys() >= {"loss", "bridge", "masked_accuracy", "masked_tokens", "gradient_norm", "rows"}
    parts = [lines[0][f"gradient_norm_{part}"] for part in ("text", "vision", "embeddings")]
    np.testing.assert_allclose(np.linalg.norm(parts), lines[0]["gradient_norm"], rtol=1e-5)
    assert all(0 < line["padding_tokens"] < 1 and 0 < line["padding_patches"] < 1 for line in lines)
    clocked = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(clocked[name] > 0 for name in CLOCK) and "mfu" not in clocked  # nobody knows the peak of a CPU
    shown = scalars(finished)
    assert list(shown) == list(range(STEPS))
    assert shown[STEPS - 1] | {"step": STEPS - 1} == pytest.approx(clocked)  # of float32
    assert lines[-1]["loss"] < lines[0]["loss"]
    metadata = read_metadata(finished)
    assert metadata["stage"] == "bridge" and metadata["parent"]["path"] == str(backbone)
    assert metadata["config"] == json.loads((finished / "config.json").read_text())
    assert metadata["data"] == open_sources(parse(TrainConfig, metadata["config"])).fingerprint
    assert [line["extra_rows"] for line in lines] == [0] * STEPS and all(line["examples"] == 8 for line in lines)
    assert all(line["dropped_masks"] >= 0 for line in lines) and any(line["dropped_masks"] > 0 for line in lines)
    assert sorted(path.name for path in (finished / "checkpoints").iterdir() if path.name.isdigit()) == ["6", "8"]


def test_killed_in_the_middle_it_continues_bit_for_bit(finished, settings_in, tmp_path):
    settings = settings_in(tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(WORKER), json.dumps(settings), "4"]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.endswith('{"step": 5') and text.count("\n") == 5
    assert train(parse(TrainConfig, settings)) == tmp_path / "run"
    assert records(tmp_path / "run") == records(finished)


@pytest.mark.parametrize(("saving", "whole"), [(3, []), (6, ["3"])])  # the first save: nothing to go back to
def test_killed_in_the_middle_of_a_save_it_continues_bit_for_bit(finished, settings_in, tmp_path, saving, whole):
    settings = settings_in(tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(WORKER), json.dumps(settings), str(-saving)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert [name for name in names if name.isdigit()] == whole and any("tmp" in name for name in names)
    assert train(parse(TrainConfig, settings)) == tmp_path / "run"
    assert records(tmp_path / "run") == records(finished)


def run_with_files_of_at_most(size: int, config: Path) -> subprocess.CompletedProcess:
    """`cocoa train` where every larger file fails as on a full disk."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "from cocoa_jax.cli import main; main()", "train", "--config", str(config)]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, preexec_fn=limit)


def test_a_full_disk_is_one_error_and_loses_nothing(finished, settings_in, tmp_path):
    settings = settings_in(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    begun = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(settings), "-6"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=200,
    )
    assert begun.returncode == -signal.SIGKILL
    # The embedding alone has 48 kB; metrics and events stay below.
    ended = run_with_files_of_at_most(20_000, tmp_path / "run.yaml")
    assert ended.returncode == 1
    told = [line for line in ended.stderr.splitlines() if line.startswith("cocoa: ")]
    assert len(told) == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert "a checkpoint could not be written to" in told[0] and "File too large" in told[0]
    assert train(parse(TrainConfig, settings)) == tmp_path / "run"
    assert records(tmp_path / "run") == records(finished)


def test_a_disk_that_is_too_full_for_metrics_is_one_error_and_loses_nothing(
    finished, settings_in, tmp_path, monkeypatch, call
):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings_in(tmp_path / "run")))
    write, before = MetricsWriter.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_and_write(self, step, metrics, load):
        if step == 4:
            while list((tmp_path / "run" / "checkpoints").glob("*tmp*")):  # the disk is full for metrics alone
                time.sleep(0.05)
            (events,) = (tmp_path / "run" / "tensorboard").iterdir()
            resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size, before[1]))
        write(self, step, metrics, load)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(MetricsWriter, "write", fill_and_write)
            status, _, said = call("train", "--config", tmp_path / "run.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (told,) = [line for line in said.splitlines() if line.startswith("cocoa: ")]
    assert status == 1 and "Traceback" not in said, said
    assert f"metrics could not be written to {tmp_path / 'run'}" in told and "File too large" in told
    assert train(parse(TrainConfig, settings_in(tmp_path / "run"))) == tmp_path / "run"
    assert records(tmp_path / "run") == records(finished)


def test_a_damaged_newest_checkpoint_is_skipped_and_the_run_repeated_from_the_one_before(
    finished, settings_in, tmp_path, caplog
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    files = [path for path in (folder / "checkpoints" / "8" / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)
    assert train(parse(TrainConfig, settings_in(folder))) == folder
    assert "checkpoints/8 is damaged" in caplog.text and "trying the one before" in caplog.text
    assert records(folder) == records(finished)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()) == ["6", "8"]


def test_sigterm_ends_with_75_and_the_same_command_continues(finished, settings_in, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings_in(tmp_path / "run")))
    command = ["train", "--config", str(tmp_path / "run.yaml")]
    write, handler = MetricsWriter.write, signal.getsignal(signal.SIGTERM)

    def write_and_be_told(self, step, metrics, load):
        write(self, step, metrics, load)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_be_told)
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
    assert ended.value.code == STOPPED == 75
    assert signal.getsignal(signal.SIGTERM) == handler
    told = capsys.readouterr().err.splitlines()[-1]
    done = int(re.fullmatch(rf"cocoa: stopped at step (\d) of {STEPS}: the same command continues", told)[1])
    assert (tmp_path / "run" / "checkpoints" / str(done)).is_dir()  # saved before it stopped
    assert [line["step"] for line in records(tmp_path / "run")] == list(range(done)) and done < STEPS
    made, make = [], loop.make_step
    monkeypatch.setattr(loop, "make_step", lambda *parts: made.append(make(*parts)) or made[-1])
    cli.main(command)
    assert records(tmp_path / "run") == records(finished)
    assert [step._cache_size() for step in made] == [1]  # a continued run compiles once, as a new one does


def test_sigterm_in_the_middle_of_the_last_save_does_not_end_it(settings_in, tmp_path, monkeypatch):
    close, ended = StageCheckpoints.close, []

    def be_told_and_close(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))  # stands for the end
    try:
        with monkeypatch.context() as patch:
            patch.setattr(StageCheckpoints, "close", be_told_and_close)
            train(parse(TrainConfig, settings_in(tmp_path / "run", loop={"steps": 3, "checkpoint_every": 3})))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended and (tmp_path / "run" / "checkpoints" / "3").is_dir()


def test_a_stop_between_two_looks_is_saved_first(settings_in, tmp_path, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(loop, "_stop_requests", lambda: contextlib.nullcontext(lambda step: next(answers)))
    asked, build = [], loop.built_ahead
    monkeypatch.setattr(loop, "built_ahead", lambda *given: asked.append(given) or build(*given))
    with pytest.raises(Stopped, match="stopped at step 2 of"):
        train(parse(TrainConfig, settings_in(tmp_path / "run")))
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert asked[0][3] > 8 * 32 * 1176 * 4  # bytes of the patches of its rows


def test_a_finished_stage_is_not_run_again(finished, settings_in, monkeypatch):
    def never(*arguments):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(loop, "make_step", never)
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert train(parse(TrainConfig, settings_in(finished))) == finished
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed: 3, 4"),
        ({"optimizer": {"learning_rate": 2e-3, "warmup_steps": 2}}, "optimizer.learning_rate: 0.001, 0.002"),
        ({"loop": {"steps": STEPS + 1, "checkpoint_every": 3}}, f"loop.steps: {STEPS}, {STEPS + 1}"),
    ],
    ids=str,
)
def test_other_settings_in_the_same_folder_are_refused_by_name(finished, settings_in, changes, named):
    with pytest.raises(SettingsError, match=re.escape(f"({named})")) as caught:
        train(parse(TrainConfig, settings_in(finished, **changes)))
    assert "\n" not in str(caught.value) and str(finished) in str(caught.value)
    assert json.loads((finished / "config.json").read_text())["seed"] == 3


def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(settings_in, tmp_path):
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "clip": 1e30}
    number = "(nan|inf)"
    with pytest.raises(Diverged, match=rf"loss is {number} and gradient norm {number} at step \d+: .* lower optimizer"):
        train(parse(TrainConfig, settings_in(tmp_path / "run", optimizer=wild)))
    (step,) = [line["step"] for line in records(tmp_path / "run")]
    assert step == 0  # the first update is what does it
    dump = tmp_path / "run" / "diverged" / "1"
    report = json.loads((dump / "report.json").read_text())
    assert report["step"] == 1 and len(report["records"]) == 8 == len(set(report["records"]))
    given = settings_in(tmp_path / "run", optimizer=wild)
    assert all(record.startswith("bridge ") for record in report["records"]) and report["seed"] == given["seed"]
    config = parse(TrainConfig, given)
    backbone = open_backbone(config.checkpoint)
    processor = Processor.load(backbone.side_files, backbone.config, config.data.processor)
    batches = iter(open_batches(config, processor))
    batch = [next(batches), next(batches)][1]
    with np.load(dump / "batch-0.npz") as saved:
        assert saved.files and all((saved[name] == batch[name]).all() for name in saved.files)
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]


def test_the_same_command_meets_a_loss_that_is_no_number_again(settings_in, tmp_path):
    """With a checkpoint before it, from which it goes on: the same step, records, numbers and batch."""
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "clip": 1e30}
    config = parse(
        TrainConfig, settings_in(tmp_path / "run", optimizer=wild, loop={"steps": STEPS, "checkpoint_every": 1})
    )
    found = []
    for _ in range(2):
        with pytest.raises(Diverged, match="at step 1: "):
            train(config)
        assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
        dump = (tmp_path / "run" / "diverged" / "1").rename(tmp_path / f"dump {len(found)}")
        with np.load(dump / "batch-0.npz") as batch:
            found.append([(dump / "report.json").read_text(), {name: batch[name].tolist() for name in batch.files}])
        found[-1].append((tmp_path / "run" / "metrics.jsonl").read_text())  # the line of step 0, not written again
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": {"data": 1}},
        {"distributed": {"heartbeat": 7}},
        {"loop": {"steps": STEPS, "checkpoint_every": 5, "keep": 1}},
    ],
    ids=str,
)
def test_a_run_may_continue_spread_and_saved_otherwise(finished, settings_in, changes):
    assert train(parse(TrainConfig, settings_in(finished, **changes))) == finished


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_weights_that_are_no_numbers_are_never_saved(settings_in, tmp_path):
    """The loss and the gradient of the step that led to them are numbers, and the next step comes after the save."""
    wild = {"learning_rate": 1e39, "warmup_steps": 0}  # infinite in float32
    loop_ = {"steps": STEPS, "checkpoint_every": 1}
    with pytest.raises(Diverged, match=r"weights are no numbers after step 0: its batch and .* are in .*diverged/0"):
        train(parse(TrainConfig, settings_in(tmp_path / "run", optimizer=wild, loop=loop_)))
    (line,) = records(tmp_path / "run")
    assert np.isfinite(line["loss"]) and np.isfinite(line["gradient_norm"])
    assert (tmp_path / "run" / "diverged" / "0" / "report.json").is_file()
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]


def test_rows_that_devices_cannot_share_are_refused(settings_in, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "batch_shards", lambda mesh: 3)
    with pytest.raises(PackingError, match=r"the 8 rows of .* cannot be shared by 3 devices"):
        train(parse(TrainConfig, settings_in(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("checkpoint", ["nowhere", "empty"])
def test_a_checkpoint_that_is_none_is_refused_before_anything_is_made(settings_in, tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=checkpoint):
        train(parse(TrainConfig, settings_in(tmp_path / "run", checkpoint=str(tmp_path / checkpoint))))
    assert not (tmp_path / "run").exists()


def test_the_next_stage_begins_where_this_one_ended(finished, stage_settings, tmp_path):
    settings = stage_settings("contrastive", finished, tmp_path / "run", loop={"steps": 2, "checkpoint_every": 5})
    settings["optimizer"] = {"warmup_steps": 1}
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    folder = train(parse(TrainConfig, settings))
    parent = read_metadata(folder)["parent"]
    assert (parent["path"], parent["stage"], parent["step"]) == (str(finished), "bridge", STEPS)
    assert parent["fingerprint"] == open_backbone(finished).fingerprint()
    assert parent["parent"]["stage"] is None
