"""What is printed about the speed of the data follows from what was made."""

import pytest

from cocoa_jax.config import SettingsError, TrainConfig, parse
from cocoa_jax.models.config import read_config
from cocoa_jax.training.data_speed import DataSpeed, chips_fed, flops_of_a_slot, measure_data

SPEED = DataSpeed(2.0, 4, 8, 60, 1000, 3000, 2000, 4000, {"16 x 48 x 32": 4})


def test_batches_are_made_for_the_time_that_is_asked(backbone, stage_settings, tmp_path):
    config = parse(TrainConfig, stage_settings("contrastive", backbone, tmp_path))
    speed = measure_data(config, 0.2)
    assert speed.seconds >= 0.2 and speed.batches >= 1 and speed.records == 8
    assert speed.shapes == {"16 x 48 x 32": speed.batches}
    assert speed.token_slots == speed.batches * 16 * 48 and 0 < speed.tokens < speed.token_slots
    assert speed.patch_slots == speed.batches * 16 * 32 and 0 < speed.patches < speed.patch_slots
    assert speed.rows <= 16 * speed.batches
    with pytest.raises(SettingsError, match="seconds is 0: give a positive number"):
        measure_data(config, 0)


def test_the_lines_are_rates_of_the_counts():
    assert SPEED.lines() == [
        "4 batches in 2.0 s: 500 ms a batch",
        "16.0 records/s, 30.0 rows/s, 500 tokens/s, 1500 patches/s",
        "fill: 50.0% of token slots, 75.0% of patch slots",
        "shape 16 x 48 x 32: 4 batches",
    ]


def test_a_chip_takes_six_flops_a_parameter_and_slot(backbone):
    config = read_config(backbone)
    token, patch = flops_of_a_slot(config)
    w, d = config.text.width, config.text
    per_layer = w * w * 2 + 2 * w * d.kv_heads * d.head_width + 3 * w * d.mlp_width
    assert 6 * 2 * per_layer < token < 6 * 2 * (per_layer + 8 * w)  # two layers, their biases and norms
    assert patch > 0
    fed = chips_fed(SPEED, config, peak_flops=1e6, utilisation=0.5)
    assert fed == pytest.approx((2000 * token + 4000 * patch) / 2 / 0.5e6)
