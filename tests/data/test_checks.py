"""Rows that a backbone would compute without a word, and wrongly, are refused with value, limit and remedy."""

import dataclasses

import numpy as np
import pytest

from cocoa_jax.data.checks import BatchError, check_batch
from cocoa_jax.data.inference import embedding_rows
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.rows import VisibilityConfig
from cocoa_jax.data.sources import Content

ROWS = RowsConfig(batch_size=4, shapes=((2, 48, 64),), examples_per_row=3, masked_per_row=3)


@pytest.fixture
def batch(processors, noise):
    contents = [Content("a kiwi", (noise(56, 84), noise(28, 28))), Content("boats", (noise(112, 56),)), Content("x")]
    ((batch, _),) = embedding_rows(contents, processors["2.5"], ROWS, VisibilityConfig())
    return {name: array.copy() for name, array in batch.items()}


def test_good_rows_pass(batch, processors):
    check_batch(batch, processors["2.5"].config)


def first_picture_token(batch) -> tuple[int, int]:
    row, column = np.argwhere(batch["unit"] >= 0)[0]
    return int(row), int(column)


def drop_a_token(batch):
    row, column = first_picture_token(batch)
    batch["tokens"][row, column], batch["unit"][row, column] = 20, -1


def drop_a_unit(batch):
    row, column = first_picture_token(batch)
    batch["unit"][row, column] = -1


def show_a_unit_in_text(batch):
    row, column = np.argwhere((batch["unit"] < 0) & (batch["token_end"] > 0))[0]
    batch["unit"][row, column] = 0


def show_a_unit_twice(batch):
    row, column = first_picture_token(batch)
    batch["unit"][row, column] = batch["unit"][row, column + 1]


def a_token_too_far(batch):
    batch["tokens"][1, 2] = 384


def a_position_too_far(batch):
    batch["positions"][0, 3, 1] = 32768


def a_negative_position(batch):
    batch["positions"][0, 3, 2] = -1


def half_a_unit(batch):
    for name in ("patches", "patch_positions", "patch_start", "patch_end", "window_start", "window_end"):
        batch[name] = batch[name][:, :62]


def other_patches(batch):
    batch["patches"] = batch["patches"][..., :1000]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_token, r"row \d: \d+ image tokens, but its patches make \d+ visual units: give one token for every 4"),
        (drop_a_unit, r"token 6 shows no visual unit; image token 6 .* build the row anew"),
        (show_a_unit_in_text, r"is text, but shows visual unit 0"),
        (show_a_unit_twice, r"do not show each of its \d+ visual units once"),
        (a_token_too_far, r"row 1, column 2: token 384, the embedding has rows 0 to 383: use the checkpoint's own"),
        (
            a_position_too_far,
            r"row 0, column 3: position .*32768.*, the checkpoint was made for 0 to 32767 .*: shorten",
        ),
        (a_negative_position, r"row 0, column 3: position .*-1.*: shorten the text or lower max_pixels"),
        (half_a_unit, r"62 patch slots make no whole units of 4: give rows.shapes a multiple of it"),
        (other_patches, r"patches hold 1000 numbers, config.json asks for 3x2x14x14 = 1176: use the checkpoint's own"),
    ],
)
def test_bad_rows_are_refused(batch, processors, damage, message):
    damage(batch)
    with pytest.raises(BatchError, match=message) as caught:
        check_batch(batch, processors["2.5"].config)
    assert "\n" not in str(caught.value)


def test_rows_are_checked_where_they_are_written(processors, noise):
    """A checkpoint made for fewer positions than the row has: refused before anything is compiled."""
    processor = processors["2"]
    text = dataclasses.replace(processor.config.text, max_positions=8)
    short = dataclasses.replace(processor, config=dataclasses.replace(processor.config, text=text))
    with pytest.raises(BatchError, match=r"made for 0 to 7 \(max_position_embeddings\)"):
        list(embedding_rows([Content("a long enough text")], short, ROWS, VisibilityConfig()))
