"""Figures of the TPU kernels that must not get worse: the compiler is deterministic, so they can be held to."""

import re

import pytest

from cocoa_jax.profiling.attention import profile_attention
from cocoa_jax.profiling.masks import mask_spans

ROOM = 1.03  # a change of the kernel that costs less than this is not worth a red test
LENGTH = 1024
# Bundles per 512 x 512 scores and query head on a v5e, unmasked and masked; the MXU bound is 1024 and 2560. The tiles
# of the table for this length are 256 x 512: they cost more than larger ones for each score, and skip more.
BUNDLES = {"forward": (1052, 1083), "backward": (2392, 2461)}
TEMPORARY = 2**20  # bytes; a dense mask alone would take that much for one row, the scores 50 times as much


@pytest.fixture(scope="module")
def rows():
    return profile_attention("v5e:1x1", [LENGTH], ["full", "packed-bridge"], ["flash_tpu"], backward=True)


@pytest.fixture(scope="module")
def row(rows):
    return rows[1]


def test_bundles_per_tile(row):
    query, key, heads, *backward = map(int, re.findall(r"\d+", row.blocks))
    tiles = {"forward": query * key, "backward": backward[0] * backward[1]}
    assert set(BUNDLES) == {name.split("_")[2].split(".")[0] for name in row.bundles}
    for name, found in row.bundles.items():
        which = name.split("_")[2].split(".")[0]
        limits, tile = BUNDLES[which], tiles[which] * heads / 512**2
        assert len(found) == 2
        for bundles, limit in zip(found, limits, strict=True):
            assert bundles / tile <= limit * ROOM, (name, found)


def test_memory_and_tiles(row):
    query, key, *_ = map(int, re.findall(r"\d+", row.blocks))
    mask = mask_spans("packed-bridge", LENGTH).as_mask(LENGTH)[0]
    tiles = mask.reshape(LENGTH // query, query, LENGTH // key, key).swapaxes(1, 2)
    assert row.temporary <= TEMPORARY
    assert row.visited == tiles.any((2, 3)).sum()
    assert row.masked == row.visited - tiles.all((2, 3)).sum()


def test_one_program_is_costed_by_the_tiles_of_each_mask(rows):
    full, packed = rows
    # Both passes of a length below 2048 have tiles of one size.
    assert packed.flops * full.visited == full.flops * packed.visited and packed.visited < full.visited
    assert packed.seconds < full.seconds
