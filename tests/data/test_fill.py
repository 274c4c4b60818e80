"""The promise about padding, on lengths that say where they come from."""

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def packing(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    found = importlib.import_module("benchmarks.packing")
    monkeypatch.setattr(found, "BATCHES", 8)
    return found


def lengths(resolution):
    return importlib.import_module("benchmarks.mmeb_lengths").MmebLengths(resolution)


def test_rows_of_2048_tokens_are_full(packing):
    """Every resolution at T = 2048: as published where that can be, else with the batch or the rows that can."""
    cases = [(resolution, tuple(row)) for resolution, *row in packing.CASES if row[0] == 2048]
    assert len(cases) == 2
    for resolution, row in cases:
        draws = lengths(resolution)
        listed = packing.MORE.get((resolution, 2048), {"3": packing.PUBLISHED})
        for size, step in listed.values():
            found = packing.stage_3(draws, row, np.random.default_rng(1), size, step)
            assert found["tokens"] >= 0.92 and found["patches"] >= 0.85, (resolution, size, step, found)
            assert found["tokens"] > found["padded_to_longest"] + 0.1
        found = packing.stages_1_and_2(draws, row, np.random.default_rng(1), 8)
        assert found["tokens"] >= 0.92 and found["patches"] >= 0.85, (resolution, found)


def test_where_fewer_slots_are_used_no_plan_uses_more(packing, monkeypatch):
    """Seven squares of 448 pixels a row: 1,024 of them in steps of eight rows are below the promise for everybody."""
    monkeypatch.setattr(packing, "shares", lambda: {"ImageNet_1K": 0.5, "MSCOCO_i2t": 0.5})
    found = packing.stage_3(lengths("square:448"), (2048, 7168), np.random.default_rng(1), *packing.PUBLISHED)
    assert found["tokens"] == found["best"] < 0.92
