"""What a batch holds and how fast it passes, of all hosts together."""

import jax
import numpy as np
import pytest

from cocoa_jax.attention.spans import segments
from cocoa_jax.chips import CHIPS
from cocoa_jax.data.pipeline import STATS
from cocoa_jax.training import throughput
from cocoa_jax.training.throughput import Load, Meter


def test_the_load_of_a_batch():
    text, pictures = segments([3, 5], 10), segments([4, 8], 16)
    batch = {"tokens": np.zeros((1, 10)), "patches": np.zeros((1, 16, 2)), "example": np.full(5, -1)}
    for name, spans in (("token", text), ("patch", pictures)):
        batch |= {f"{name}_start": spans.start[None], f"{name}_end": spans.end[None]}
    stats = np.zeros(len(STATS), np.int32)
    stats[[STATS.index(f"{name}_used") for name in ("examples", "tokens", "patches")]] = 4, 15, 20
    load = Meter(lambda work: work.tokens + work.predicted, 2).load(batch, stats, 7)  # half of it is another host's
    assert load == Load(examples=4, pictures=3, tokens=15, patches=20, token_slots=20, patch_slots=32, flops=22)
    assert load.padding() == {"padding_tokens": 0.25, "padding_patches": 0.375}
    stats[STATS.index("patches_used")] = 12  # all pictures are in this half
    assert Meter(lambda work: 0.0, 2).load(batch, stats, 7).pictures == 2
    assert Load(1, 0, 5, 0, 10, 0, 0).padding() == {"padding_tokens": 0.5}


@pytest.mark.parametrize("chip", [None, CHIPS["v5e"]])
def test_the_pace_of_a_step(monkeypatch, chip):
    monkeypatch.setattr(throughput, "chip_of_kind", lambda kind: chip)
    load = Load(8, 4, 100, 20, 120, 32, flops=3e12 * jax.device_count())
    pace = Meter(lambda work: 0.0, 1).pace(load, 2.0)
    assert pace.pop("mfu", None) == (None if chip is None else pytest.approx(1.5e12 / chip.peak_flops))
    assert pace == {
        "seconds": 2.0,
        "pictures_per_second": 2.0,
        "examples_per_second": 4.0,
        "tokens_per_second": 50.0,
        "tflops_per_second": 1.5,
    }
