"""Evaluation on many devices and in several processes: the scores of one, from a folder that all of them see."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cocoa_jax.embedder import Embedder
from cocoa_jax.evaluation.sets import evaluate_sets, named_sets
from cocoa_jax.training.hosts import COORDINATOR, COUNT, INDEX

PATH = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_eight_devices_that_share_the_weights_give_the_embeddings_of_one(trained, make_picture, tmp_path):
    (tmp_path / "noise.png").write_bytes(make_picture(3))
    items = [{"text": f"word {i} " * (1 + i % 5)} for i in range(9)] + [{"image": str(tmp_path / "noise.png")}]
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("many_devices.py")), str(trained), json.dumps(items)],
        env={**PATH, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found, want = json.loads(ended.stdout), Embedder.load(trained).embed(items)
    assert found["shares"] == 8
    np.testing.assert_allclose(found["rows"], want, atol=2e-6)  # float32 sums in another order


def start(number: int, address: str, *words: object) -> subprocess.Popen:
    environment = {**PATH, COORDINATOR: address, COUNT: "2", INDEX: str(number)}
    command = [sys.executable, "-m", "cocoa_jax", "evaluate", *map(str, words), "--distributed.heartbeat=10"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_two(first: tuple[object, ...], second: tuple[object, ...]) -> list[tuple[int, str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    parts = [start(0, address, *first), start(1, address, *second)]
    try:
        said = [part.communicate(timeout=300) for part in parts]
    finally:
        for part in parts:
            part.kill()
    return [(part.returncode, *words) for part, words in zip(parts, said, strict=True)]


@pytest.mark.slow
def test_two_processes_score_as_one_and_only_the_first_writes(trained, own_sets, tmp_path):
    words = ("--checkpoint", trained, "--tasks", own_sets, "--output")
    first, second = run_two((*words, tmp_path / "two"), (*words, tmp_path / "two"))
    assert first[0] == second[0] == 0, (first[2], second[2])
    assert "report: " in first[1] and "report: " not in second[1]
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    alone = evaluate_sets(trained, tmp_path / "one", named_sets(str(own_sets), None))
    for name, one in alone["sets"].items():
        for key in ("p_at_1", "mrr", "contents", "made_with"):
            assert results["sets"][name][key] == one[key], (name, key)


@pytest.mark.slow
def test_an_output_that_is_not_shared_is_refused_by_both(trained, own_sets, tmp_path):
    words = ("--checkpoint", trained, "--tasks", own_sets, "--output")
    for status, _, told in run_two((*words, tmp_path / "a"), (*words, tmp_path / "b")):
        assert status == 1
        assert re.search(
            r"cocoa: processes \[1\] do not see what process 0 writes in .*: give an output on a disk", told
        )
