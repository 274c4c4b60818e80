"""Data and runs in a bucket over HTTP: the libraries as they are, before a server that speaks Google's storage API.

``test_buckets`` looks closer at what lies in the bucket.
"""

import contextlib
import json
import socket

import pytest
import yaml
from etils import epath
from etils.epath import backend
from fsspec.asyn import sync
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server
from gcsfs.core import simple_upload

from cocoa_jax import cli
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.embedder import Embedder
from cocoa_jax.evaluation.probe import is_shifted
from cocoa_jax.evaluation.run import first_ancestor
from cocoa_jax.training import loop
from cocoa_jax.training.loop import Stopped, train

BUCKET = "cocoa-runs"
SOURCES = {"bridge": "bridge", "contrastive": "caption"}  # embedded pictures by stage


def of_the_end(request, response, storage, *more, whole=objects.download):
    """The server knows no range that counts from the end, which array_record asks for first."""
    headers = request._request_handler.headers
    if (headers["range"] or "").startswith("bytes=-"):
        size = len(storage.get_file(request.params["bucket_name"], request.params["object_id"]))
        headers.replace_header("range", f"bytes={max(size - int(headers['range'][7:]), 0)}-")
    whole(request, response, storage, *more)


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # for gcsfs
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)  # for array_record
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")  # TensorStore's name for it
        patch.setattr(objects, "download", of_the_end)
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
        with create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET):
            yield f"gs://{BUCKET}"
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()


def mark(folder):
    """What a mounted bucket and its console make beside a folder: an empty object that has its name and a slash."""
    system = epath.Path(folder)._backend.fs(folder)
    sync(system.loop, simple_upload, system, BUCKET, folder.removeprefix(f"gs://{BUCKET}/") + "/", b"")


@pytest.mark.timeout(900)
def test_data_and_stages_in_a_bucket_are_those_on_a_disk(bucket, backbone, stage_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def settings(stage, checkpoint, where):
        given = stage_settings(stage, checkpoint, f"{where}/{stage}")
        path = f"{where}/data/{SOURCES[stage]}/1.0.0"
        mixture = {"captions": {"format": "prepared", "path": path, "stages": [stage]}}
        (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"datasets": mixture}))
        data = {**given["data"], "kinds": {}, "mixture": str(tmp_path / "mixture.yaml")}
        run = {"steps": 4, "checkpoint_every": 2, "compilation_cache": str(tmp_path / "compiled")}
        return parse(TrainConfig, {**given, "data": data, "loop": run})

    def made(where, interrupted):
        processor = ["--processor.min_pixels=784", "--processor.max_pixels=6272", "--processor.max_text_tokens=16"]
        for source in SOURCES.values():
            words = ["data", "build", f"pictures:{source}:validation", f"--checkpoint={backbone}"]
            cli.main([*words, f"--output={where}/data", "--build.workers=0", *processor])
        second = settings("bridge", backbone, where)
        if interrupted:
            with monkeypatch.context() as patch:
                patch.setattr(loop, "_stop_requests", lambda: contextlib.nullcontext(lambda step: step == 2))
                with pytest.raises(Stopped, match="stopped at step 3 of 4"):
                    train(second)
            for folder in ("", "/backbone", "/checkpoints", "/checkpoints/3"):
                mark(second.output + folder)
        train(second)
        train(settings("contrastive", second.output, where))
        lines = ((epath.Path(where) / stage / "metrics.jsonl").read_text().splitlines() for stage in SOURCES)
        losses = [[json.loads(line)["loss"] for line in some] for some in lines]
        return losses, Embedder.load(f"{where}/contrastive").embed([{"text": "a kiwi"}]).tolist()

    on_disk = made(str(tmp_path / "disk"), interrupted=False)
    assert made(f"{bucket}/all", interrupted=True) == on_disk
    # Evaluation and probe find what came before a stage that lies there.
    assert first_ancestor(f"{bucket}/all/contrastive") == backbone
    assert is_shifted(f"{bucket}/all/contrastive") == is_shifted(tmp_path / "disk" / "contrastive")
    # Nothing of a bucket was taken for a folder of this machine.
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "compiled", "mixture.yaml"}
