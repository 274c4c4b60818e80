"""What the device cannot check: rows that a backbone would compute without a word, and wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from cocoa_jax.models.config import Qwen2VLConfig


class BatchError(ValueError):
    """The arrays of a batch do not fit each other or the backbone."""


def check_batch(batch: Mapping[str, np.ndarray], config: Qwen2VLConfig) -> None:
    """Refuse a batch of ``rows.write_rows``' form before anything is compiled for it; a fraction of a millisecond.

    Raises:
        BatchError: an id outside the vocabulary, a position outside the table, patch slots that make no whole units,
            or picture tokens that do not match the visual units of their row.
    """
    problem = next(_problems(batch, config), None)
    if problem is not None:
        raise BatchError(problem)


def _problems(batch: Mapping[str, np.ndarray], config: Qwen2VLConfig) -> Iterator[str]:
    tokens, positions, vision = batch["tokens"], batch["positions"], config.vision
    slots, values = batch["patches"].shape[1:]
    if values != vision.patch_values:
        yield (
            f"patches hold {values} numbers, config.json asks for {vision.channels}x{vision.temporal_patch_size}x"
            f"{vision.patch_size}x{vision.patch_size} = {vision.patch_values}: use the checkpoint's own preprocessor"
        )
    if slots % vision.unit_patches:
        yield f"{slots} patch slots make no whole units of {vision.unit_patches}: give rows.shapes a multiple of it"
    most = config.text.vocab_size
    for row, column in np.argwhere((tokens < 0) | (tokens >= most))[:1]:
        yield (
            f"row {row}, column {column}: token {tokens[row, column]}, the embedding has rows 0 to {most - 1}: "
            "use the checkpoint's own tokenizer"
        )
    most = config.text.max_positions
    for row, column in np.argwhere(((positions < 0) | (positions >= most)).any(-1))[:1]:
        yield (
            f"row {row}, column {column}: position {positions[row, column].tolist()}, the checkpoint was made for 0 to "
            f"{most - 1} (max_position_embeddings): shorten the text or lower max_pixels"
        )
    yield from _misplaced(batch, config)


def _misplaced(batch: Mapping[str, np.ndarray], config: Qwen2VLConfig) -> Iterator[str]:
    """Every picture token shows one visual unit of its row, and every unit is shown once."""
    tokens, unit = batch["tokens"], batch["unit"]
    pads = (tokens == config.image_token) | (tokens == config.video_token)
    units = (batch["patch_end"] > batch["patch_start"]).sum(1) // config.vision.unit_patches
    for row, column in np.argwhere(pads != (unit >= 0))[:1]:
        what = "shows no visual unit" if pads[row, column] else f"is text, but shows visual unit {unit[row, column]}"
        yield (
            f"row {row}, column {column}: token {tokens[row, column]} {what}; image token {config.image_token} and "
            f"video token {config.video_token} stand for units and nothing else does: build the row anew"
        )
    for row, (shown, made) in enumerate(zip(pads.sum(1), units, strict=True)):
        if shown != made:
            yield (
                f"row {row}: {shown} image tokens, but its patches make {made} visual units: give one token for every "
                f"{config.vision.unit_patches} patches"
            )
        elif sorted(unit[row][pads[row]]) != list(range(made)):
            yield f"row {row}: its {shown} image tokens do not show each of its {made} visual units once: build it anew"
