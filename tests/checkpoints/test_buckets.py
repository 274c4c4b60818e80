"""Checkpoints at ``gs://`` paths: all of Orbax and of the path library runs, above a folder that stands in for the
bucket.

Three things are exchanged, where those libraries reach for the network: the file system of ``gs://``, TensorStore's
driver of it, and the question whether the bucket has folders of its own. Every place that was asked for is written
down.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils

sys.path.insert(0, str(Path(__file__).parent))
import stage_worker

from cocoa_jax.checkpoints.convert import orbax_to_hf
from cocoa_jax.checkpoints.orbax import StageCheckpoints, load_params, read_metadata
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.training import loop
from cocoa_jax.training.loop import Stopped, train

STAGE = "gs://b/run/1-warmup"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The folder in which ``gs://b`` lies, and the places that TensorStore was sent to."""
    folder, asked = tmp_path / "bucket", list[str]()

    class Bucket(DirFileSystem):
        protocol = ("gcs", "gs")

        def __init__(self, **options):
            super().__init__(path=str(folder), fs=LocalFileSystem(auto_mkdir=True))

        @classmethod
        def _strip_protocol(cls, path):
            return str(path).removeprefix("gs://").strip("/")

    def driver(path: str) -> dict[str, str]:
        asked.append(path)
        return {"driver": "file", "path": str(folder / path.removeprefix("gs://"))}

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", driver)
    monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: object())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    yield folder / "b", asked
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    assert not list(here.iterdir()), "a gs:// path was taken for one of this machine"


def wanted():
    return stage_worker.abstract(stage_worker.state(0))


def test_a_path_reaches_the_libraries_as_it_is_and_the_newest_are_kept(bucket):
    folder, asked = bucket
    with StageCheckpoints(STAGE, keep=2) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.restore_latest(wanted()) is None
        for step in (1, 2, 3):
            stage_worker.save(checkpoints, step, stage_worker.state(step))
        assert checkpoints.steps() == [2, 3]
        restored = checkpoints.restore_latest(wanted())
    assert restored.step == 3
    jax.tree.map(np.testing.assert_array_equal, restored.params, stage_worker.state(3)["params"])
    assert sorted(path.name for path in (folder / "run/1-warmup/checkpoints").iterdir() if path.is_dir()) == ["2", "3"]
    assert asked and all(path.startswith(f"{STAGE}/checkpoints/") for path in asked)
    assert read_metadata(STAGE) == {"stage": "bridge"}


def test_what_was_not_finished_or_is_damaged_is_passed_over(bucket):
    folder, _ = bucket
    with StageCheckpoints(STAGE, keep=3) as checkpoints:
        for step in (1, 2):
            stage_worker.save(checkpoints, step, stage_worker.state(step))
    steps = folder / "run/1-warmup/checkpoints"
    # A bucket has no renaming: a checkpoint that a kill cut short has its name already, and no mark that it is whole.
    shutil.copytree(steps / "2", steps / "3")
    (steps / "3" / "commit_success.txt").unlink()
    largest = max((path for path in (steps / "2/params").rglob("*") if path.is_file()), key=lambda x: x.stat().st_size)
    largest.write_bytes(largest.read_bytes()[::-1])
    jax.tree.map(np.testing.assert_array_equal, load_params(STAGE, wanted()["params"]), stage_worker.state(1)["params"])
    with StageCheckpoints(STAGE, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore_latest(wanted()).step == 1
        stage_worker.save(checkpoints, 3, stage_worker.state(3))
        assert checkpoints.restore_latest(wanted()).step == 3


def test_a_run_in_a_bucket_stops_and_continues_as_one_on_a_disk(
    bucket, backbone, stage_settings, tmp_path, monkeypatch
):
    def settings(output):
        given = stage_settings("bridge", backbone, output)
        run = {"steps": 4, "checkpoint_every": 2, "compilation_cache": str(tmp_path / "compiled")}
        return parse(TrainConfig, {**given, "output": str(output), "loop": run})

    def losses(folder):
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    on_disk = losses(train(settings(tmp_path / "disk")))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_stop_requests", lambda: contextlib.nullcontext(lambda step: step == 2))
        with pytest.raises(Stopped, match="stopped at step 3 of 4"):
            train(settings(STAGE))
    assert str(train(settings(STAGE))) == STAGE
    assert losses(bucket[0] / "run/1-warmup") == on_disk
    exported = []
    for name, stage in (("from-disk", tmp_path / "disk"), ("from-bucket", STAGE)):
        orbax_to_hf(stage, tmp_path / name)
        exported.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert exported[0] == exported[1] and "cocoa.json" in exported[0]
