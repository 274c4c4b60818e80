"""Checkpoints of a stage: exact, atomic, movable between meshes, and able to lose the newest."""

import asyncio
import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from orbax.checkpoint._src.serialization import serialization

sys.path.insert(0, str(Path(__file__).parent))
import stage_worker

from cocoa_jax.checkpoints.causes import chain
from cocoa_jax.checkpoints.contents import checksums, contents_of
from cocoa_jax.checkpoints.errors import CheckpointError, DamagedCheckpointError, UnavailableCheckpointError
from cocoa_jax.checkpoints.orbax import (
    StageCheckpoints,
    backbone_folder,
    carry_backbone,
    load_params,
    read_metadata,
)
from cocoa_jax.checkpoints.reading import read_checked

# Orbax drops what it has not read yet when one item of a checkpoint turns out to be damaged.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
WORKER = Path(stage_worker.__file__)
GOLDEN = WORKER.parent.parent / "golden"


def process(action: str, folder: Path, devices: int) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(WORKER), action, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(action: str, folder: Path, devices: int) -> None:
    worker = process(action, folder, devices)
    _, errors = worker.communicate(timeout=100)
    assert worker.returncode == 0, errors


def assert_equal(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, left, right))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A stage with steps 1, 2 and 3; copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    with StageCheckpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            stage_worker.save(checkpoints, step, stage_worker.state(step), wait=False)
    return folder


def wanted():
    return stage_worker.abstract(stage_worker.state(0))


def test_everything_comes_back_as_it_was(stage):
    with StageCheckpoints(stage, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        for step in (1, 2, 3):
            restored, trees = checkpoints.restore(step, wanted()), stage_worker.state(step)
            assert_equal({name: restored.__dict__[name] for name in trees}, trees)
            assert (restored.step, restored.loop, restored.metadata) == (step, {"step": step}, {"stage": "bridge"})


def test_the_newest_are_kept(stage):
    with StageCheckpoints(stage, keep=2) as checkpoints:
        stage_worker.save(checkpoints, 10, stage_worker.state(10))
        assert checkpoints.steps() == [3, 10]


def test_a_stage_without_checkpoints(tmp_path):
    with StageCheckpoints(tmp_path / "new", keep=1) as checkpoints:
        assert checkpoints.restore_latest(wanted()) is None
    for read in (lambda: load_params(tmp_path / "new", wanted()["params"]), lambda: read_metadata(tmp_path / "no")):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            read()


def test_empty_trees_and_parts(tmp_path):
    trees = {"params": stage_worker.state(1)["params"], "head": {}, "optimizer": ((), ())}
    with StageCheckpoints(tmp_path, keep=1) as checkpoints:
        stage_worker.save(checkpoints, 1, trees)
        restored = checkpoints.restore(1, stage_worker.abstract(trees))
        assert (restored.head, restored.optimizer) == ({}, ((), ()))
        part = checkpoints.restore(1, {"params": stage_worker.abstract(trees["params"])})
        assert part.head is None and part.optimizer is None
        assert_equal(part.params, trees["params"])


def test_donated_arrays_do_not_reach_the_disk(tmp_path):
    """The next step overwrites the state while the save runs: what is saved must be the state before."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"kernel": jnp.zeros((1 << 20,))}
    with StageCheckpoints(tmp_path, keep=3) as checkpoints:
        for number in range(3):
            stage_worker.save(checkpoints, number, {"params": tree, "head": {}, "optimizer": {}}, wait=False)
            for _ in range(5):
                tree = step(tree)
        shape = {"params": {"kernel": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}}
        for number in range(3):
            np.testing.assert_array_equal(checkpoints.restore(number, shape).params["kernel"], 5.0 * number)


def test_a_save_returns_while_its_arrays_are_being_written(tmp_path, monkeypatch):
    write, begun, go_on = serialization.async_serialize_from_host, threading.Event(), threading.Event()

    async def write_when_told(*given, **more):
        begun.set()
        await asyncio.to_thread(go_on.wait, 20)  # no longer, for a save that waits to end too
        await write(*given, **more)

    monkeypatch.setattr(serialization, "async_serialize_from_host", write_when_told)
    with StageCheckpoints(tmp_path, keep=1) as checkpoints:
        stage_worker.save(checkpoints, 1, stage_worker.state(1), wait=False)
        found = begun.wait(60), checkpoints.steps()
        go_on.set()
        checkpoints.wait()
        assert found == (True, []) and checkpoints.steps() == [1]


def test_a_step_is_never_overwritten(stage):
    with (
        StageCheckpoints(stage, keep=3) as checkpoints,
        pytest.raises(CheckpointError, match="holds step 2 already"),
    ):
        stage_worker.save(checkpoints, 2, stage_worker.state(9))
    assert_equal(load_params(stage, wanted()["params"]), stage_worker.state(3)["params"])


def test_records_must_be_json(tmp_path):
    with (
        StageCheckpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(CheckpointError, match="loop cannot be saved"),
    ):
        checkpoints.save(1, **stage_worker.state(1), loop={"seed": np.ones(2)}, metadata={})
    with pytest.raises(CheckpointError, match="keep is 0"):
        StageCheckpoints(tmp_path, keep=0)


@pytest.mark.parametrize(("saved", "restored"), [(8, 1), (1, 8)])
def test_another_number_of_devices(tmp_path, saved, restored):
    run("save", tmp_path, saved)
    run("restore", tmp_path, restored)


def test_killed_in_the_middle_of_a_save(tmp_path):
    worker = process("save-for-ever", tmp_path, 1)
    assert worker.stdout is not None
    try:
        for line in worker.stdout:
            unfinished = [path.name for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]
            if int(line) >= 3 and unfinished:
                break
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    assert worker.returncode == -signal.SIGKILL
    with StageCheckpoints(tmp_path, keep=2) as checkpoints:
        trees = stage_worker.state(1, rows=1 << 18)
        restored = checkpoints.restore_latest(stage_worker.abstract(trees))
        assert restored is not None and restored.step == checkpoints.steps()[-1]
        last = restored.step
        assert_equal(restored.params, stage_worker.state(last, rows=1 << 18)["params"])
        stage_worker.save(checkpoints, last + 1, trees)
        assert checkpoints.steps()[-1] == last + 1


def test_a_disk_that_is_full_is_one_error_and_loses_nothing(tmp_path):
    """Of a save that is waited for, and of one that nobody waits for before the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trees = stage_worker.state(1)
    with StageCheckpoints(tmp_path, keep=2) as checkpoints:
        stage_worker.save(checkpoints, 1, trees)
    for wait in (True, False):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))  # the kernel has 16 kB
        try:
            with (
                pytest.raises(CheckpointError, match=r"could not be written to .*File too large.* make room") as caught,
                StageCheckpoints(tmp_path, keep=2) as checkpoints,
            ):
                stage_worker.save(checkpoints, 2, trees, wait=wait)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(caught.value)
    with StageCheckpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [1]
        assert_equal(checkpoints.restore(1, wanted()).params, trees["params"])
        stage_worker.save(checkpoints, 2, stage_worker.state(2))
        assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, "whole, make room and continue"),
        (ValueError("OUT_OF_RANGE: Quota [os_error_code='122']"), CheckpointError, "whole, make room and continue"),
        (PermissionError(errno.EACCES, "Permission denied"), CheckpointError, "whole, remove the cause and continue"),
        (ConnectionResetError("peer"), UnavailableCheckpointError, "whole, continue by the same command"),
        (ValueError("UNAVAILABLE: 503"), UnavailableCheckpointError, "whole, continue by the same command"),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: task 1"), jax.errors.JaxRuntimeError, "^UNAVAILABLE: task 1$"),
    ],
    ids=repr,
)
def test_why_a_save_failed_is_kept(tmp_path, monkeypatch, cause, kind, words):
    """What ends by itself, what needs room, and what the loss of another process is to those who wait for its part."""

    def fail(self):
        raise RuntimeError("in the background") from cause

    with (
        pytest.raises(kind, match=words) as caught,
        StageCheckpoints(tmp_path, keep=1) as checkpoints,
        monkeypatch.context() as patch,
    ):
        patch.setattr(type(checkpoints._checkpointer), "wait", fail)
        stage_worker.save(checkpoints, 1, stage_worker.state(1))
    assert type(caught.value) is kind and len(list(chain(caught.value))) == 3


def test_what_a_killed_run_left_unfinished_is_removed_and_never_read(stage):
    left = stage / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(stage / "checkpoints" / "3", left)
    assert_equal(load_params(stage, wanted()["params"]), stage_worker.state(3)["params"])
    assert left.exists()  # a reader may look while another process is saving
    with StageCheckpoints(stage, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        stage_worker.save(checkpoints, 4, stage_worker.state(4))
    assert not left.exists()


def files_of(stage: Path, step: int, item: str) -> list[Path]:
    return [path for path in (stage / "checkpoints" / str(step) / item).rglob("*") if path.is_file()]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_a_damaged_newest_checkpoint_is_skipped_and_replaced(stage, harm, caplog):
    harm(max(files_of(stage, 3, "params"), key=lambda path: path.stat().st_size))
    with StageCheckpoints(stage, keep=2) as checkpoints:
        with pytest.raises(DamagedCheckpointError, match="checkpoints/3 is damaged"):
            checkpoints.restore(3, wanted())
        with caplog.at_level(logging.WARNING, logger="cocoa_jax"):
            restored = checkpoints.restore_latest(wanted())
        assert "checkpoints/3 is damaged" in caplog.text
        assert restored is not None and restored.step == 2
        assert_equal(restored.params, stage_worker.state(2)["params"])
        assert_equal(load_params(stage, wanted()["params"]), stage_worker.state(2)["params"])
        stage_worker.save(checkpoints, 3, stage_worker.state(33))
        assert checkpoints.steps() == [2, 3]
    assert_equal(load_params(stage, wanted()["params"]), stage_worker.state(33)["params"])


def test_a_damaged_checkpoint_takes_no_place_among_those_kept(stage):
    cut(max(files_of(stage, 3, "optimizer"), key=lambda path: path.stat().st_size))
    with StageCheckpoints(stage, keep=2) as checkpoints:
        latest = checkpoints.restore_latest(wanted())
        assert latest is not None and latest.step == 2
        stage_worker.save(checkpoints, 5, stage_worker.state(5))
        assert checkpoints.steps() == [2, 5]


@pytest.mark.parametrize("record", ["loop", "metadata", "contents"])
def test_damaged_records_are_damage(stage, record):
    for path in files_of(stage, 3, record):
        cut(path)
    with StageCheckpoints(stage, keep=2) as checkpoints:
        latest = checkpoints.restore_latest(wanted())
        assert latest is not None and latest.step == 2
    assert read_metadata(stage) == {"stage": "bridge"}


@pytest.mark.parametrize("record", ["loop", "metadata", "contents"])
def test_a_changed_byte_in_a_record_is_damage_wherever_it_is(stage, record):
    path = epath.Path(stage) / "checkpoints" / "3"
    (file,) = (file for file in files_of(stage, 3, record) if file.name == "data.json")
    good = file.read_bytes()
    name = (
        good.find(b'"records"') if record == "contents" else len(good)
    )  # of the checksum: all others are as they were
    for place in range(0, len(good), max(1, len(good) // 25)):
        if not name <= place < name + len(b'"records"'):
            changed = bytearray(good)
            changed[place] ^= 0x10
            file.write_bytes(changed)
            with pytest.raises(DamagedCheckpointError):
                read_checked(path, wanted(), same_dtype=True)
    file.write_bytes(good)
    assert read_checked(path, wanted(), same_dtype=True)[1]["loop"] == {"step": 3}


def test_a_checkpoint_from_before_there_was_a_checksum_of_the_records_is_read(stage):
    path = epath.Path(stage) / "checkpoints" / "3"
    (file,) = (file for file in files_of(stage, 3, "contents") if file.name == "data.json")
    contents = json.loads(file.read_text())
    assert contents.pop("records")
    file.write_text(json.dumps(contents))
    assert read_checked(path, wanted(), same_dtype=True)[1]["loop"] == {"step": 3}
    for name in ("params", "shape"):  # what is told without one: a key that is not there
        file.write_text(json.dumps(contents).replace(f'"{name}"', '"other"', 1))
        with pytest.raises(DamagedCheckpointError, match=f"its contents lack '{name}'"):
            read_checked(path, wanted(), same_dtype=True)


def test_when_all_are_damaged_nothing_is_guessed(stage):
    for step in (1, 2, 3):
        shutil.rmtree(stage / "checkpoints" / str(step) / "params")
    with (
        StageCheckpoints(stage, keep=2) as checkpoints,
        pytest.raises(
            DamagedCheckpointError,
            match=r"all checkpoints .* damaged \(\[1, 2, 3\], the newest: .*3 is damaged: .*params.*\): remove them",
        ),
    ):
        checkpoints.restore_latest(wanted())
    with pytest.raises(DamagedCheckpointError, match="train this stage again"):
        load_params(stage, wanted()["params"])


def test_another_model_is_refused_by_naming_both_sides(stage):
    other = wanted()
    other["params"]["text"]["kernel"] = jax.ShapeDtypeStruct((512, 9), jnp.float32)
    other["params"]["text"]["bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    del other["params"]["text"]["scale"]
    other["head"]["out"] = jax.ShapeDtypeStruct((5,), jnp.bfloat16)
    with StageCheckpoints(stage, keep=3) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore_latest(other)
    assert not isinstance(caught.value, DamagedCheckpointError)
    assert str(caught.value).splitlines()[1:] == [
        "  head/out: the checkpoint has float32[5], wanted bfloat16[5]",
        "  params/text/bias: not in the checkpoint, wanted float32[4]",
        "  params/text/scale: the checkpoint has bfloat16[3], not wanted",
        "  params/text/kernel: the checkpoint has float32[512, 8], wanted float32[512, 9]",
    ]
    with StageCheckpoints(stage, keep=3) as checkpoints, pytest.raises(CheckpointError, match=r"only \[1, 2, 3\]"):
        checkpoints.restore(4, wanted())


def test_the_next_stage_takes_the_backbone_in_its_own_dtype_and_without_the_optimizer(stage):
    shutil.rmtree(stage / "checkpoints" / "3" / "optimizer")
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), wanted()["params"])
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stage_worker.state(3)["params"])
    assert_equal(load_params(stage, half), expected)
    assert read_metadata(stage) == {"stage": "bridge"}


def test_side_files_of_the_backbone_travel_once(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(GOLDEN / "qwen2.config.json", source / "config.json")
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"weights")
    folder = carry_backbone(source, tmp_path / "stage")
    assert folder == backbone_folder(tmp_path / "stage")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    (source / "tokenizer.json").write_text("changed")
    assert carry_backbone(source, tmp_path / "stage") == folder
    assert (folder / "tokenizer.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="holds no config"):
        carry_backbone(tmp_path, tmp_path / "other")


DTYPES = st.sampled_from([np.float32, np.float16, np.int32, np.uint8, jnp.bfloat16, np.bool_])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=DTYPES, shape=hnp.array_shapes(max_dims=3, max_side=4))
def test_a_checksum_sees_every_changed_bit(data, dtype, shape):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    place = data.draw(st.integers(0, size - 1))
    bit = 1
    if dtype is np.bool_:
        raw = bytes(byte & 1 for byte in raw)
    else:
        bit = 1 << data.draw(st.integers(0, 7))
    other = raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]
    left, right = (jnp.asarray(np.frombuffer(value, dtype).reshape(shape)) for value in (raw, other))
    assert checksums([left]) != checksums([right])
    assert checksums([left]) == checksums([jnp.array(left)])


def test_a_checksum_sees_exchanged_elements():
    assert checksums([jnp.asarray([1.0, 2.0, 3.0])]) != checksums([jnp.asarray([2.0, 1.0, 3.0])])
    assert checksums([jnp.asarray([[1, 2], [3, 4]])]) != checksums([jnp.asarray([[1, 3], [2, 4]])])
    assert contents_of({"a": {"b": jnp.zeros((), jnp.int32)}})["a/b"] == {"dtype": "int32", "shape": [], "checksum": 0}
