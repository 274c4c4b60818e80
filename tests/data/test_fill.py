"""The promise about padding, on lengths that say where they come from."""

import importlib
from pathlib import Path

import numpy as np


def test_rows_of_2048_tokens_are_full(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    packing = importlib.import_module("benchmarks.packing")
    resolution, *row = packing.CASES[0]
    assert row[0] == 2048
    monkeypatch.setattr(packing, "BATCHES", 8)
    draws = importlib.import_module("benchmarks.mmeb_lengths").MmebLengths(resolution)
    for found in (
        packing.stage_3(draws, tuple(row), np.random.default_rng(1)),
        packing.stages_1_and_2(draws, tuple(row), np.random.default_rng(1), 8),
    ):
        assert found["tokens"] >= 0.92 and found["patches"] >= 0.85, found
        assert found["tokens"] > found["padded_to_longest"] + 0.1
