"""Pictures kept decoded: the same batches, each picture decoded once, never more than the limit."""

import dataclasses

import numpy as np
import pytest

from cocoa_jax.config import DataConfig, SettingsError
from cocoa_jax.data import pixels
from cocoa_jax.data.decoded import DecodedPictures
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.data.sources import Content


@pytest.mark.parametrize("family", ["2", "2.5"])
def test_kept_pictures_are_the_decoded_ones_and_are_decoded_once(processors, noise, family, monkeypatch):
    processor = dataclasses.replace(processors[family], decoded=DecodedPictures(1 << 20))
    images = [noise(28 * side, 56, seed=side) for side in (1, 2, 3)]
    images.append(dataclasses.replace(images[0], mirrored=True))
    calls = []
    decode = pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda image: calls.append(image) or decode(image))
    for _ in range(2):
        for image in images:
            np.testing.assert_array_equal(_patches(processor, image), _patches(processors[family], image))
    # Once by the processor that keeps them, twice by the other.
    assert [calls.count(image) for image in images] == [3] * len(images)


def test_the_limit_holds_and_what_is_full_still_gives_pictures(processors, noise):
    images = [noise(56, 56, seed=seed) for seed in range(4)]
    one = processors["2"].pixels.patch_bytes(images[0]).nbytes
    kept = DecodedPictures(2 * one + 1)
    for image in images:
        made = kept.get(image, processors["2"].pixels.patch_bytes)
        np.testing.assert_array_equal(made, processors["2"].pixels.patch_bytes(image))
    assert kept.used == 2 * one == sum(found.nbytes for found in kept.kept.values())


def test_a_negative_amount_of_memory_is_refused():
    rows = RowsConfig(batch_size=2, shapes=((1, 32, 16),), examples_per_row=4, masked_per_row=8)
    with pytest.raises(SettingsError, match="decoded_mib is -1"):
        DataConfig(ProcessorConfig(), rows, kinds={"caption": 1.0}, decoded_mib=-1)


def _patches(processor, image):
    example = processor.embedding(Content("", (image,)))
    out = np.empty((example.patches, processor.pixels.patch_values), np.float32)
    processor.fill_patches(example, out)
    return out
