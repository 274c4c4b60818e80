"""Batches for inference are built ahead, in bounded memory, and are the same by however many threads."""

import threading

import numpy as np
import pytest

from cocoa_jax.data import inference
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.rows import VisibilityConfig, write_rows
from cocoa_jax.data.sources import Content

ROWS = RowsConfig(batch_size=2, shapes=((2, 24, 0),), examples_per_row=1, masked_per_row=1)
CONTENTS = [Content(f"word {i} " * (i % 4 + 1)) for i in range(14)]


@pytest.fixture
def built(monkeypatch):
    """How many batches were built so far."""
    count = threading.Semaphore(0)

    def write(*given, **more):
        try:
            return write_rows(*given, **more)
        finally:
            count.release()

    monkeypatch.setattr(inference, "write_rows", write)
    return count


def test_threads_change_no_batch(processors):
    make = [CONTENTS, processors["2"], ROWS, VisibilityConfig()]
    for (one, held), (other, places) in zip(
        inference.embedding_rows(*make), inference.embedding_rows(*make, threads=4), strict=True
    ):
        np.testing.assert_array_equal(held, places)
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


@pytest.mark.parametrize(("room", "ahead"), [(2**33, 3), (0, 1)])
def test_batches_are_built_ahead_as_far_as_their_bytes_allow(processors, built, monkeypatch, room, ahead):
    monkeypatch.setattr(inference, "_AHEAD", room)
    rows = RowsConfig(batch_size=2, shapes=((2, 24, 8),), examples_per_row=1, masked_per_row=1)
    batches = inference.embedding_rows(CONTENTS, processors["2"], rows, VisibilityConfig(), threads=3)
    next(batches)
    for _ in range(1 + ahead):  # the one that is used, and those ahead of it
        assert built.acquire(timeout=60)
    assert not built.acquire(timeout=0.3)
    batches.close()
