"""What is damage and what is not, and that all processes of a run come to the same answer."""

import errno
import sys
from pathlib import Path

import aiohttp
import gcsfs
import google.auth.exceptions
import jax
import numpy as np
import pytest
import requests
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.experimental.v1._src.handlers.registration import NoEntryError

sys.path.insert(0, str(Path(__file__).parent))
import stage_worker

from cocoa_jax.checkpoints import reading
from cocoa_jax.checkpoints.errors import CheckpointError, DamagedCheckpointError, UnavailableCheckpointError
from cocoa_jax.checkpoints.orbax import StageCheckpoints, load_params


class RefreshError(ValueError):
    """Stands for those of google.auth, some of which are ValueErrors."""


def http(code: int) -> Exception:
    """What gcsfs raises in the end where its own retries did not help."""
    return gcsfs.retry.HttpError({"code": code, "message": "no"})


PASSES = [
    http(503),
    http(429),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientOSError(errno.EPIPE, "Broken pipe"),
    aiohttp.ClientPayloadError("not all of it came"),
    requests.exceptions.ConnectionError("connection aborted"),
    requests.exceptions.ReadTimeout("timed out"),
    google.auth.exceptions.TransportError("no token"),
    TimeoutError("timed out"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ValueError("UNAVAILABLE: Error reading: CURL error: 503"),
    ValueError("DEADLINE_EXCEEDED: no answer"),
]
NO_DAMAGE = [
    *PASSES,
    http(401),
    aiohttp.InvalidURL("no url"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    MemoryError("cannot allocate"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"),
    ValueError("PERMISSION_DENIED: Error reading local file: [OS error 13: Permission denied]"),
    ValueError("RESOURCE_EXHAUSTED: Too many open files"),
    RefreshError("token expired"),
]
DAMAGE = [
    FileNotFoundError("no _METADATA"),
    KeyError("write_shape"),
    ValueError("NOT_FOUND: Error reading zarr.json"),
    ValueError("DATA_LOSS: Error reading manifest"),
    ValueError("OUT_OF_RANGE: Requested byte range is not valid"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with StageCheckpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            stage_worker.save(checkpoints, step, stage_worker.state(step))
    return folder


def wanted():
    return stage_worker.abstract(stage_worker.state(0))


def failing(monkeypatch, cause: Exception, of: str = "2") -> None:
    """Reading a step fails as Orbax fails, which wraps whatever goes wrong."""
    load = reading.ocp.load_checkpointables

    def fail(path, items):
        if path.name != of:
            return load(path, items)
        try:
            raise cause
        except Exception as error:
            raise NoEntryError("Failed to load checkpointable: params due to incompatible handler") from error

    monkeypatch.setattr(reading.ocp, "load_checkpointables", fail)


@pytest.mark.parametrize("cause", NO_DAMAGE, ids=repr)
def test_what_is_no_damage_is_raised_and_loses_nothing(stage, monkeypatch, cause):
    with StageCheckpoints(stage, keep=2) as checkpoints:
        with monkeypatch.context() as patch:
            failing(patch, cause)
            with pytest.raises(CheckpointError, match=r"2 cannot be read now .*may be whole") as caught:
                checkpoints.restore_latest(wanted())
            assert type(caught.value) is (UnavailableCheckpointError if cause in PASSES else CheckpointError)
            assert (str(cause).splitlines() or [repr(cause)])[0] in str(caught.value)
            with pytest.raises(CheckpointError, match="may be whole"):
                load_params(stage, wanted()["params"])
        stage_worker.save(checkpoints, 3, stage_worker.state(3))
        assert checkpoints.steps() == [2, 3]  # a step that was taken for damaged would be gone
        assert checkpoints.restore(2, wanted()).step == 2


@pytest.mark.parametrize("cause", DAMAGE, ids=repr)
def test_damage_goes_back_a_step(stage, monkeypatch, cause):
    failing(monkeypatch, cause)
    with StageCheckpoints(stage, keep=2) as checkpoints:
        latest = checkpoints.restore_latest(wanted())
    assert latest is not None and latest.step == 1


OK, DAMAGED, UNAVAILABLE, UNREADABLE = 0, 1, 2, 3
MET = {
    DAMAGED: DamagedCheckpointError("own damage"),
    UNAVAILABLE: UnavailableCheckpointError("own network"),
    UNREADABLE: CheckpointError("own rights"),
}


@pytest.mark.parametrize("records", [True, False], ids=["records", "arrays"])
@pytest.mark.parametrize(
    ("mine", "other", "raised", "words"),
    [
        (OK, DAMAGED, DamagedCheckpointError, r"processes \[1\] could not read it"),
        (OK, UNREADABLE, CheckpointError, r"cannot be read by processes \[1\].*may be whole"),
        (DAMAGED, OK, DamagedCheckpointError, "own damage"),
        (UNREADABLE, DAMAGED, CheckpointError, "own rights"),
        (UNAVAILABLE, DAMAGED, UnavailableCheckpointError, "own network"),
        (DAMAGED, UNAVAILABLE, UnavailableCheckpointError, r"cannot be read by processes \[1\].*may be whole"),
        (UNAVAILABLE, UNREADABLE, CheckpointError, r"cannot be read by processes \[1\].*may be whole"),
        (DAMAGED, UNREADABLE, CheckpointError, r"cannot be read by processes \[1\].*may be whole"),
    ],
)
def test_all_processes_agree_on_what_one_of_them_met(stage, monkeypatch, records, mine, other, raised, words):
    """The second of two processes is a stand-in that says what it met when it is asked, for the records or later."""
    path = epath.Path(stage) / "checkpoints" / "2"
    whole = reading.read_records(path) | reading.load_items(path, wanted())
    asked = []

    def items(path, names):
        if mine != OK and records == (set(names) == set(reading.RECORDS)):
            raise MET[mine]
        return {name: whole[name] for name in names}

    def gather(value):
        asked.append(int(value))
        return np.array([value, other if records == (len(asked) == 1) else OK])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(reading, "load_items", items)
    with pytest.raises(raised, match=words) as caught:
        reading.read_checked(path, wanted(), same_dtype=True)
    assert type(caught.value) is raised
    assert len(asked) == (1 if records else 2)  # nobody goes on to the next question without an answer to this one
