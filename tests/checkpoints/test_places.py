"""Folders in buckets: what is not an array goes there and comes back; the bucket is one in memory.

Arrays are Orbax's and TensorStore's own business there, and are not tested here.
"""

import contextlib
import json
import re
import shutil
import sys

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.orbax import backbone_folder, carry_backbone, is_adapted
from cocoa_jax.checkpoints.places import carry, fetch, folder_at, is_remote, log_file, twin
from cocoa_jax.config import SettingsError, TrainConfig, parse, to_dict
from cocoa_jax.data.mixture import Mixture
from cocoa_jax.evaluation.probe import is_shifted
from cocoa_jax.training import inputs, metrics
from cocoa_jax.training.folder import check_settings, prepare
from cocoa_jax.training.loop import Stopped
from cocoa_jax.training.metrics import MetricsWriter
from cocoa_jax.training.throughput import Load, Meter


class Bucket(MemoryFileSystem):
    """What `gs://` leads to in these tests."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012
    marked: set = set()  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + re.sub(r"^(gs|gcs)://", "", str(path)).strip("/")

    def ls(self, path, detail=True, **more):  # as gcsfs, which lists the object that marks a folder by its own name
        found, own = super().ls(path, detail=True, **more), self._strip_protocol(path)
        marks = [{"name": own, "size": 0, "type": "directory"}] if own in self.marked else []
        return [*marks, *found] if detail else [one["name"] for one in (*marks, *found)]

    def exists(self, path, **more):  # as gcsfs, in which this alone tells of a network that fails
        try:
            return bool(self.info(path))
        except FileNotFoundError:
            return False

    def isfile(self, path):
        with contextlib.suppress(Exception):
            return self.info(path)["type"] == "file"
        return False


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty one; what stands in for it on this machine lies in tmp_path."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    Bucket.marked.clear()
    yield Bucket.store
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


def test_local_folders_are_their_own_twins(tmp_path):
    assert not is_remote(tmp_path) and twin(tmp_path) == folder_at(tmp_path) == fetch(tmp_path) == tmp_path
    carry(tmp_path)
    assert twin("gs://b/run") != twin("gs://b/other") and str(folder_at("gs://b/run")) == "gs://b/run"


def test_files_go_and_come(bucket):
    local = twin("gs://b/run")
    (local / "tensorboard").mkdir(parents=True)
    (local / "metrics.jsonl").write_text("line\n")
    (local / "tensorboard" / "events").write_bytes(b"\0\1")
    carry("gs://b/run")
    assert sorted(bucket) == ["/b/run/metrics.jsonl", "/b/run/tensorboard/events"]
    (local / "metrics.jsonl").write_text("other\n")
    assert (fetch("gs://b/run") / "metrics.jsonl").read_text() == "line\n"
    assert [path.name for path in fetch("gs://b/run").iterdir()] == ["metrics.jsonl"]  # nothing of before stays


def test_the_object_that_marks_a_folder_is_no_file_of_it(bucket):
    """Mounts of a bucket and its console make them."""
    (folder_at("gs://b/run") / "backbone").mkdir(parents=True)
    (folder_at("gs://b/run") / "backbone" / "config.json").write_text("sizes")
    Bucket.marked.add("/b/run/backbone")
    assert [path.name for path in folder_at("gs://b/run/backbone").iterdir()] == ["backbone", "config.json"]
    assert [path.name for path in fetch("gs://b/run/backbone").iterdir()] == ["config.json"]


def test_a_backbone_goes_with_its_stage_and_is_opened_there(bucket, backbone):
    folder = carry_backbone(backbone, "gs://b/run/1-warmup")
    assert folder == backbone_folder("gs://b/run/1-warmup")
    names = {path.removeprefix("/b/run/1-warmup/backbone/") for path in bucket}
    assert {"config.json", "tokenizer.json"} <= names and not any("safetensors" in name for name in names)
    del bucket["/b/run/1-warmup/backbone/tokenizer.json"]  # killed on the way
    carry_backbone(backbone, "gs://b/run/1-warmup")
    opened = open_backbone("gs://b/run/1-warmup")
    assert opened.trained and opened.config == open_backbone(backbone).config
    assert (opened.side_files / "tokenizer.json").read_bytes() == (backbone / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match="gs://b/elsewhere is not a trained stage"):
        open_backbone("gs://b/elsewhere")


def test_a_bucket_that_cannot_be_asked_is_not_one_that_lacks_a_stage(bucket, backbone, monkeypatch):
    """Launchers try again after the one, and delete slices after the other."""
    carry_backbone(backbone, "gs://b/run/1-warmup")

    def fail(*arguments, **named):
        raise ConnectionResetError("no answer")

    monkeypatch.setattr(Bucket, "info", fail)
    assert not folder_at("gs://b/run/1-warmup").is_dir()
    for ask in (open_backbone, is_adapted, is_shifted, lambda stage: fetch(backbone_folder(stage))):
        with pytest.raises(ConnectionResetError, match="no answer"):
            ask("gs://b/run/1-warmup")


def test_nothing_stays_in_a_bucket_of_a_checkpoint_that_the_run_did_not_begin_from(bucket, backbone, stage_settings):
    left = folder_at("gs://b/run") / "backbone" / "tokenizer.json"
    left.parent.mkdir(parents=True)
    left.write_text("of another checkpoint, before a kill")
    config = parse(TrainConfig, stage_settings("bridge", backbone, "gs://b/run"))
    with pytest.raises(SettingsError, match="gs://b/run/backbone is not of a run of this folder"):
        prepare(config, Mixture({}, {}, {}), open_backbone(backbone))
    check_settings(folder_at("gs://b/run") / "config.json", to_dict(config))  # what an attempt of the run leaves first
    prepare(config, Mixture({}, {}, {}), open_backbone(backbone))
    assert left.read_bytes() == (backbone / "tokenizer.json").read_bytes()
    assert "/b/run/parent.json" in bucket


def test_settings_are_kept_and_compared(bucket):
    path = folder_at("gs://b/run") / "config.json"
    check_settings(path, {"seed": 3})
    check_settings(path, {"seed": 3, "mesh": {"fsdp": 4}}, ["mesh"])
    assert json.loads(bucket["/b/run/config.json"].getvalue()) == {"seed": 3}
    with pytest.raises(SettingsError, match=r"gs://b/run was made with other settings \(seed: 3, 4\)"):
        check_settings(path, {"seed": 4})


def test_lines_of_a_log_are_continued_on_another_machine(bucket):
    with log_file("gs://b/run", "bad_records.jsonl").open("a") as file:
        file.write("one\n")
    carry("gs://b/run")
    shutil.rmtree(twin("gs://b/run"))  # another machine
    with log_file("gs://b/run", "bad_records.jsonl").open("a") as file:
        file.write("two\n")
    carry("gs://b/run")
    assert bucket["/b/run/bad_records.jsonl"].getvalue() == b"one\ntwo\n"


def test_bad_records_that_a_bucket_names_stay_named(bucket, backbone, stage_settings, monkeypatch):
    report = folder_at("gs://b/run") / "bad_records.jsonl"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("one\n")
    settings = stage_settings("bridge", backbone, "gs://b/run")
    monkeypatch.setattr(inputs, "stage_dataset", lambda *more, report, **named: report)
    config = parse(TrainConfig, settings)
    assert inputs.open_dataset(config, None, inputs.open_sources(config)).read_text() == "one\n"


def test_metrics_follow_at_every_checkpoint_and_are_continued(bucket):
    def written() -> list[int]:
        return [json.loads(line)["step"] for line in bucket["/b/run/metrics.jsonl"].getvalue().splitlines()]

    load, meter = Load(2, 1, 6, 4, 8, 8, 1e9), Meter(lambda work: 1e9, 1)
    with MetricsWriter("gs://b/run", "bridge", 0, 9, meter) as writer:
        for step in range(4):
            writer.write(step, {"loss": 1.0}, load)
            if step == 1:
                writer.carry()
                assert written() == [0, 1]
    assert written() == [0, 1, 2, 3]
    (twin("gs://b/run") / "metrics.jsonl").unlink()  # another machine goes on from step 2
    with MetricsWriter("gs://b/run", "bridge", 2, 9, meter) as writer:
        writer.write(2, {"loss": 2.0}, load)
    assert written() == [0, 1, 2]
    assert any(path.startswith("/b/run/tensorboard/events") for path in bucket)


def test_a_file_goes_again_when_it_has_changed(bucket):
    local, sent = twin("gs://b/run"), {}
    local.mkdir(parents=True)
    (local / "trace").write_text("large")
    (local / "metrics.jsonl").write_text("one\n")
    carry("gs://b/run", sent)
    assert sorted(bucket) == ["/b/run/metrics.jsonl", "/b/run/trace"]
    bucket.clear()
    (local / "metrics.jsonl").write_text("one\ntwo\n")
    carry("gs://b/run", sent)
    assert {name: file.getvalue() for name, file in bucket.items()} == {"/b/run/metrics.jsonl": b"one\ntwo\n"}


def test_logs_that_do_not_reach_the_bucket_are_told_of_and_follow_later(bucket, monkeypatch, caplog):
    def fail(*arguments):
        raise ConnectionResetError("no answer")

    def writer():
        return MetricsWriter("gs://b/run", "bridge", 0, 9, Meter(lambda work: 1e9, 1))

    with writer() as first, monkeypatch.context() as patch:
        first.write(0, {"loss": 1.0}, Load(2, 1, 6, 4, 8, 8, 1e9))
        patch.setattr(metrics, "carry", fail)
        first.carry()
        told = f"logs could not be written to gs://b/run (no answer): they are in {twin('gs://b/run')}"
        assert told in caplog.text and not bucket
    assert "/b/run/metrics.jsonl" in bucket
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "carry", fail)
        patch.setattr(metrics.time, "sleep", lambda seconds: None)
        caplog.clear()
        with pytest.raises(ConnectionResetError), writer():  # nobody would bring them later
            pass
        assert told in caplog.text
        caplog.clear()
        with pytest.raises(SettingsError, match="an error before"), writer():
            raise SettingsError("an error before")
        assert told in caplog.text  # the cause of this one, not the error before


@pytest.mark.parametrize("ended", [None, Stopped], ids=str)
def test_logs_are_tried_again_at_the_end_since_the_next_command_has_nothing_left_to_do(bucket, monkeypatch, ended):
    failures, waited = [ConnectionResetError("no answer"), TimeoutError("no answer")], []

    def fail_twice(*arguments):
        if failures:
            raise failures.pop()
        carry(*arguments)

    monkeypatch.setattr(metrics, "carry", fail_twice)
    monkeypatch.setattr(metrics.time, "sleep", waited.append)
    with (
        contextlib.nullcontext() if ended is None else pytest.raises(ended),
        MetricsWriter("gs://b/run", "bridge", 0, 1, Meter(lambda work: 1e9, 1)) as writer,
    ):
        writer.write(0, {"loss": 1.0}, Load(2, 1, 6, 4, 8, 8, 1e9))
        if ended is not None:
            raise ended
    assert b'"step": 0' in bucket["/b/run/metrics.jsonl"].getvalue() and len(waited) == 2


def test_what_stays_wrong_with_logs_is_not_tried_again(bucket, monkeypatch):
    def fail(*arguments):
        raise PermissionError("no right to write")

    monkeypatch.setattr(metrics, "carry", fail)
    monkeypatch.setattr(metrics.time, "sleep", lambda seconds: pytest.fail("waited"))
    with (
        pytest.raises(PermissionError, match="no right"),
        MetricsWriter("gs://b/run", "bridge", 0, 1, Meter(lambda work: 1e9, 1)),
    ):
        pass
