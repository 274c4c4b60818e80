"""Several processes of one run: they are one, they stop together, and none outlives another by more than a minute."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from cocoa_jax import cli
from cocoa_jax.checkpoints.errors import CheckpointError, UnavailableCheckpointError
from cocoa_jax.config import DistributedConfig, SettingsError
from cocoa_jax.training import hosts, loop
from cocoa_jax.training.hosts import (
    COORDINATOR,
    COUNT,
    INDEX,
    PeerLost,
    Peers,
    _shared,
    again,
    check_shared,
    first_alone,
    peers,
)
from cocoa_jax.training.loop import STOPPED

WORKER = Path(__file__).with_name("host_run.py")
LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 24
DISAGREED = (
    "processes [1] do not hold what the others do (seed: 0, 1): give all hosts the same files and the same command"
)
ENVIRONMENT = {COORDINATOR: "10.0.0.1:8482", COUNT: "4", INDEX: "3"}


@pytest.mark.parametrize(
    ("config", "environment", "found"),
    [
        ({}, {}, None),
        ({}, ENVIRONMENT, Peers("10.0.0.1:8482", 4, 3)),
        ({"process": 0}, ENVIRONMENT, Peers("10.0.0.1:8482", 4, 0)),
        ({"coordinator": "a:1", "processes": 2, "process": 0}, {}, Peers("a:1", 2, 0)),
        ({"mode": "off"}, ENVIRONMENT, None),
        ({"mode": "on"}, {}, Peers()),  # JAX finds them
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, Peers()),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({}, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Peers()),
    ],
    ids=str,
)
def test_how_processes_find_each_other(config, environment, found):
    assert peers(DistributedConfig(**config), environment) == found


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        ({"coordinator": "a:1"}, {}, f"missing ['distributed.processes or {COUNT}', 'distributed.process or {INDEX}']"),
        ({}, {COUNT: "2", INDEX: "0"}, f"missing ['distributed.coordinator or {COORDINATOR}']"),
        ({}, {**ENVIRONMENT, INDEX: "first"}, f"{INDEX} is 'first'"),
    ],
)
def test_half_a_description_is_refused(config, environment, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        peers(DistributedConfig(**config), environment)


@pytest.mark.parametrize(
    ("owned", "process", "blocks"),
    [
        ({0: (0, 1), 1: (2, 3)}, 1, (2, 3)),
        ({0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}, 0, (0, 1, 4, 5)),  # hosts of 2x2 chips in a 4x4 slice
        ({0: (1,), 1: (0,)}, 1, (0,)),
        ({0: (0,), 1: (0,), 2: (1,), 3: (1,)}, 3, (1,)),  # tensor over two hosts
    ],
)
def test_shares(owned, process, blocks):
    found = _shared(owned, process)
    assert (found.blocks, found.count) == (blocks, len(set(owned.values())))


def test_rows_that_hosts_hold_in_part_are_refused():
    with pytest.raises(SettingsError, match=r"which overlap: make mesh\.tensor divide"):
        _shared({0: (0, 1), 1: (1, 2)}, 0)


# ------------------------------------------------------------------------------------------------ real processes


@pytest.fixture(scope="module")
def shared(tmp_path_factory, backbone, stage_settings):
    """What the runs of this file share: settings, and programs that were compiled."""
    return backbone, stage_settings, tmp_path_factory.mktemp("compiled")


def settings_of(shared, output: Path, stage: str, steps: int = STEPS, every: int = 8, lora=None, **mesh: int) -> Path:
    backbone, stage_settings, _ = shared
    settings = stage_settings(stage, backbone, output, loop={"steps": steps, "checkpoint_every": every}, lora=lora)
    settings["optimizer"] = {"learning_rate": 1e-4, "warmup_steps": 2}
    settings |= {"mesh": mesh or {"fsdp": 2}, "distributed": {"heartbeat": 10}, "compute": {"attention": "reference"}}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_parts(*words: str) -> list[subprocess.Popen]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        **{COORDINATOR: free_address(), COUNT: "2"},
    }
    command = [sys.executable, str(WORKER.with_name("host_parts.py")), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env={**environment, INDEX: str(index)}, **pipes) for index in range(2)]


def test_two_processes_meet_lay_out_rows_save_and_stop_together(tmp_path):
    told = []
    for process in start_parts(str(tmp_path / "stage")):
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]
        told.append(json.loads(next(line for line in output.splitlines() if line.startswith("told "))[5:]))
    assert [one.pop("made") for one in told] == [1, 0]  # process 0 alone makes the folder
    assert [one.pop("blocks") for one in told] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert told[0] == told[1]  # the signal reached one of them
    assert told[0].pop("stop") is not None
    agreed, settings, same, *others = told[0].pop("said")
    assert agreed == same == ""
    assert settings.startswith(
        "processes [1] do not hold what the others do (loop.steps: 4, 5): give all hosts the same"
    )
    assert len(others) == 3 and all(
        "processes [1] read other records than the others for step 7" in one for one in others
    )
    assert told[0] == {"found": [True, True], "step": 2, "same": True}


def assert_retryable(status: int, errors: str) -> None:
    """Launchers go on after this exit status, and somebody is told why; negative ones are signals."""
    retry = re.search(r'^RETRY="(.*)"$', (LAUNCH / "lib.sh").read_text(), re.MULTILINE)
    assert (128 - status if status < 0 else status) in map(int, retry[1].split()), (status, errors[-3000:])
    assert "another process or a device is gone" in errors or "another task died" in errors, errors[-3000:]


@pytest.mark.parametrize(
    ("processes", "error", "status"),
    [
        (2, "UNKNOWN: Gloo all-reduce failed: Connection reset by peer\nand more", STOPPED),
        (2, "UNAVAILABLE: a TPU is halted", STOPPED),
        (2, "RESOURCE_EXHAUSTED: 3 GiB too many", 1),  # would be so again
        (1, "UNKNOWN: what has no other process to blame", 1),
    ],
)
def test_an_error_of_the_runtime_is_another_process_gone(
    shared, tmp_path, monkeypatch, capsys, processes, error, status
):
    def fail(config):
        raise jax.errors.JaxRuntimeError(error)

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(loop, "join", lambda config: None)
    monkeypatch.setattr(loop, "_train", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--config", str(settings_of(shared, tmp_path / "run", "bridge"))])
    told = capsys.readouterr().err
    assert ended.value.code == status and error.splitlines()[0] in told
    if status == STOPPED:
        assert_retryable(status, told)
        assert told.endswith("): the same command continues\n") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "status"),
    [(UnavailableCheckpointError, STOPPED), (ConnectionError, STOPPED), (CheckpointError, 1), (BrokenPipeError, 1)],
)
def test_a_checkpoint_that_cannot_be_read_now_is_tried_again(shared, tmp_path, monkeypatch, capsys, kind, status):
    def fail(config):
        raise kind("no answer from the bucket")

    monkeypatch.setattr(loop, "_train", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--config", str(settings_of(shared, tmp_path / "run", "bridge"))])
    assert (ended.value.code, capsys.readouterr().err) == (status, "cocoa: no answer from the bucket\n")


def test_a_process_that_never_comes_ends_the_other():
    meet = "from cocoa_jax.config import DistributedConfig; from cocoa_jax.training.hosts import join"
    there = {COORDINATOR: free_address(), COUNT: "2", INDEX: "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"{meet}; join(DistributedConfig(start=1))"]
    ended = subprocess.run(command, env={**os.environ, **there}, capture_output=True, text=True, timeout=300)
    assert_retryable(ended.returncode, ended.stderr)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_other(killed):
    started = start_parts("die", str(killed))
    try:
        assert started[killed].wait(300) == -signal.SIGKILL
        before = time.monotonic()
        _, errors = started[1 - killed].communicate(timeout=300)
        assert time.monotonic() - before < 60  # the promise to users, not a measurement
    finally:
        statuses(started)
    assert_retryable(started[1 - killed].returncode, errors)


@pytest.mark.parametrize(
    ("where", "ended", "told"),
    [
        ("first", (1, 1), ("was made with other settings", "process 0 could not go on, and says why (folder)")),
        ("second", (None, 1), ("", "was made with other settings")),
        ("both", (1, 1), (DISAGREED, DISAGREED)),
        ("none", (0, 0), ("", "")),
    ],
)
def test_an_error_that_stays_is_no_lost_process_and_what_one_writes_at_the_end_is_waited_for(where, ended, told):
    """JAX ends with SIGABRT, which launchers try again, those of whom one has left for longer than its heartbeat."""
    started = start_parts("fail", where)
    outputs = [process.communicate(timeout=300) for process in started]
    assert ("written" in outputs[0][0]) == (where in ("both", "none"))
    for process, (_, errors), status, words in zip(started, outputs, ended, told, strict=True):
        if status is None:  # it is told that the other is gone, by a collective or for want of a sign of life
            assert_retryable(process.returncode, errors)
            continue
        lines = [line for line in errors.splitlines() if line.startswith("cocoa: ")]
        assert (process.returncode, lines) == (status, [f"cocoa: {words}"] if words else []), errors[-3000:]


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(SettingsError("other settings"), SettingsError, 1), (ConnectionResetError("no answer"), PeerLost, STOPPED)],
)
def test_the_others_end_as_process_0_ends(monkeypatch, error, raised, status):
    """For good, or to be tried again."""

    def wrong():
        raise error

    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "meet", lambda: None)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda value: sent.append(value) or sent[0])
    with pytest.raises(type(error), match=str(error)):
        first_alone("folder", wrong)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    with pytest.raises(raised, match=r"process 0 could not go on, and says why \(folder\)") as caught:
        first_alone("folder", wrong)
    assert again(caught.value) == again(error) == (status == STOPPED)


def test_hosts_wait_for_each_other_before_devices_do(monkeypatch, tmp_path):
    asked = []

    def ask(value):
        asked.append("collective")
        raise InterruptedError

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "meet", lambda: asked.append("meeting"))
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", ask)
    with pytest.raises(InterruptedError):
        check_shared(tmp_path)
    assert asked == ["meeting", "collective"]


def start(shared, config: Path, processes: int, tell: tuple[int, int, int] = (-1, 0, -1), **more: str):
    """Start a run on 8 devices; ``tell`` is which process gets which signal at which step."""
    address = free_address()
    started = []
    for index in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
            "JAX_COMPILATION_CACHE_DIR": str(shared[2]),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            **more,
        }
        if processes > 1:
            environment |= {COORDINATOR: address, COUNT: str(processes), INDEX: str(index)}
        told = tell[1:] if index == tell[0] else (0, -1)
        command = [sys.executable, str(WORKER), str(config), *map(str, told)]
        log = config.with_suffix(f".{index}.log").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True))
    return started


def statuses(started, seconds: int = 400) -> list[int]:
    """How processes ended; none is left."""
    try:
        end = time.monotonic() + seconds
        return [process.wait(max(1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("stage", ["contrastive", pytest.param("warmup", marks=pytest.mark.slow)])
def test_an_adapter_trains_the_same_on_two_processes_and_after_a_kill(shared, tmp_path, stage):
    """2 x 4 devices are as 8 of one process, to rounding; and on 8, killed and continued, to the bit."""

    def trained(name: str, processes: int, *signals: int) -> list[list[float]]:
        config = settings_of(shared, tmp_path / name, stage, 6, 2, lora={"rank": 4, "alpha": 8.0})
        if signals:
            assert statuses(start(shared, config, processes, (0, *signals))) == [-signal.SIGKILL]
        ended = statuses(start(shared, config, processes))
        assert ended == [0] * processes, [path.read_text()[-3000:] for path in tmp_path.glob(f"{name}.*.log")]
        return losses(tmp_path / name)

    alone = trained("alone", 1)
    assert len(alone) == 6 and np.ptp(alone) > 1e-3 * alone[0]
    assert trained("killed", 1, signal.SIGKILL, 4) == alone
    np.testing.assert_allclose(trained("two", 2), alone, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_are_one_run_and_continue_on_one_and_on_two(shared, tmp_path):
    """Stage 3, whose loss sees all rows: on 8 devices of one process; and on 2 x 4, then 8, then 2 x 4 again."""
    alone = settings_of(shared, tmp_path / "alone", "contrastive")
    assert statuses(start(shared, alone, 1)) == [0], (tmp_path / "alone.0.log").read_text()

    def logs() -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(tmp_path.glob("moved.*.log")))

    moved = settings_of(shared, tmp_path / "moved", "contrastive")
    # SIGTERM reaches one process; both save the same step and ask to be tried again.
    assert statuses(start(shared, moved, 2, (1, signal.SIGTERM, 0))) == [STOPPED, STOPPED], logs()
    first = len(losses(tmp_path / "moved"))
    assert 1 <= first < STEPS - 1
    assert "cocoa: stopped at step" in (tmp_path / "moved.0.log").read_text()
    assert statuses(start(shared, moved, 1, (0, signal.SIGTERM, first))) == [STOPPED], logs()
    assert first < len(losses(tmp_path / "moved")) < STEPS
    # The rest on hosts whose devices lie between each other's.
    assert statuses(start(shared, moved, 2, INTERLEAVED="1")) == [0, 0], logs()
    moved_losses, alone_losses = losses(tmp_path / "moved"), losses(tmp_path / "alone")
    # Sums run in another order: a hundred roundings of float32 before the first update, and what Adam makes of them.
    np.testing.assert_allclose(moved_losses[0], alone_losses[0], rtol=1e-5)
    np.testing.assert_allclose(moved_losses, alone_losses, rtol=1e-3)


@pytest.mark.slow
def test_a_run_that_was_killed_continues_on_another_mesh(shared, tmp_path):
    """SIGKILL on 4 x 2 devices, the rest on 2 x 2 x 2: the same losses to rounding."""
    alone = settings_of(shared, tmp_path / "alone", "contrastive", steps=12)
    assert statuses(start(shared, alone, 1)) == [0], (tmp_path / "alone.0.log").read_text()
    moved = settings_of(shared, tmp_path / "moved", "contrastive", steps=12)
    assert statuses(start(shared, moved, 1, (0, signal.SIGKILL, 9))) == [-signal.SIGKILL]
    moved = settings_of(shared, tmp_path / "moved", "contrastive", steps=12, data=2, fsdp=2, tensor=2)
    assert statuses(start(shared, moved, 1)) == [0], (tmp_path / "moved.0.log").read_text()
    moved_losses, alone_losses = losses(tmp_path / "moved"), losses(tmp_path / "alone")
    assert moved_losses[:8] == alone_losses[:8]  # made on the first mesh, saved after the eighth step
    # Sums run in another order: a hundred roundings of float32 over four steps.
    np.testing.assert_allclose(moved_losses, alone_losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_others_within_a_minute(shared, tmp_path, killed):
    config = settings_of(shared, tmp_path / "run", "bridge", steps=100_000)
    started = start(shared, config, 2, (killed, signal.SIGKILL, 3))
    try:
        assert started[killed].wait(400) == -signal.SIGKILL
        before = time.monotonic()
        status = started[1 - killed].wait(400)
        # The promise to users, not a measurement.
        assert time.monotonic() - before < 60
    finally:
        statuses(started)
    text = config.with_suffix(f".{1 - killed}.log").read_text()
    assert_retryable(status, text)
