"""The same rows of text, pictures and videos for this project and for transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cocoa_jax.attention.spans import Spans, bidirectional, causal, segments, truncated
from cocoa_jax.data.vision_plan import VisionRun, plan_image, token_positions
from cocoa_jax.models.config import Qwen2VLConfig

Document = Sequence[int | VisionRun]
"""Numbers of text tokens, and pictures or videos; the last number counts the bridge token and block B."""

MASKS = ("causal", "bidirectional", "truncated")


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Rows of one document each; B rows, T token slots, P patch slots.

    Args:
        batch: this project's arrays, all but the spans of the tokens.
        theirs: numpy arguments of a transformers model; no key where there is no picture or no video.
        real: [B, T], slots that hold a token.
        bridge: column of each row's bridge token.
        patch_slots, unit_slots: (rows, slots) of what the tower of transformers gives, pictures before videos; units
            in reading order.
    """

    config: Qwen2VLConfig
    batch: dict[str, np.ndarray]
    theirs: dict[str, np.ndarray]
    real: np.ndarray
    bridge: np.ndarray
    patch_slots: tuple[np.ndarray, np.ndarray]
    unit_slots: tuple[np.ndarray, np.ndarray]

    def spans(self, mask: str) -> Spans:
        """What each token sees under one of ``MASKS``."""
        first, last = self.real.argmax(1), self.real.shape[1] - self.real[:, ::-1].argmax(1)
        whole = Spans(*(np.where(self.real, x[:, None], 0).astype(np.int32) for x in (first, last)))
        at = np.where(self.real, self.bridge[:, None], 0).astype(np.int32)
        made = {"causal": causal, "bidirectional": bidirectional}
        return truncated(whole, Spans(at, at + 1)) if mask == "truncated" else made[mask](whole)

    def ours(self, mask: str) -> dict[str, np.ndarray]:
        """The batch under one of ``MASKS``."""
        seen = self.spans(mask)
        return {**self.batch, "token_start": seen.start, "token_end": seen.end}


@dataclasses.dataclass
class _Row:
    """One document, built from the left."""

    ids: list[int]
    units: list[int]
    runs: list[int | VisionRun]
    seen: list[tuple[VisionRun, np.ndarray]]


def lay_out(
    config: Qwen2VLConfig, documents: Sequence[Document], tokens: int, patches: int, *, side: str, seed: int
) -> Layout:
    """Rows of random text and random pixels, padded on one side.

    Args:
        tokens, patches: T and P, which no row may exceed.
        side: ``left`` or ``right``, where the padding of the tokens stands.
    """
    rng, vision = np.random.default_rng(seed), config.vision
    rows = [_row(config, document, rng) for document in documents]
    B = len(rows)
    batch: dict[str, np.ndarray] = {
        "tokens": np.zeros((B, tokens), np.int32),
        "positions": np.zeros((B, tokens, 3), np.int32),
        "unit": np.full((B, tokens), -1, np.int32),
        "patches": np.zeros((B, patches, vision.patch_values), np.float32),
        "patch_positions": np.zeros((B, patches, 2), np.int32),
    }
    real, bridge = np.zeros((B, tokens), bool), np.zeros(B, np.int32)
    for b, row in enumerate(rows):
        at = tokens - len(row.ids) if side == "left" else 0
        columns = slice(at, at + len(row.ids))
        real[b, columns], batch["tokens"][b, columns], batch["unit"][b, columns] = True, row.ids, row.units
        batch["positions"][b, columns] = token_positions(row.runs, vision)
        last = documents[b][-1]
        bridge[b] = at + len(row.ids) - (last if isinstance(last, int) else 1)
    batch |= _patch_spans(config, rows, patches)
    slots = _fill_patches(config, rows, batch)
    return Layout(config, batch, _theirs(config, rows, batch, real), real, bridge, *slots)


def _row(config: Qwen2VLConfig, document: Document, rng: np.random.Generator) -> _Row:
    row, vision = _Row([], [], [], []), config.vision
    shown = 0
    for run in document:
        if isinstance(run, int):
            row.ids += rng.integers(0, config.text.vocab_size - 10, run).tolist()
            row.units += [-1] * run
            row.runs.append(run)
            continue
        plan = plan_image(run.grid, vision)
        count = len(plan.unit_of_token)
        pad = config.image_token if run.seconds_per_slice is None else config.video_token
        row.ids += [config.vision_start_token, *[pad] * count, config.vision_end_token]
        row.units += [-1, *(plan.unit_of_token + shown).tolist(), -1]
        row.runs += [1, run, 1]
        row.seen.append((run, rng.standard_normal((len(plan.order), vision.patch_values), np.float32)))
        shown += count
    return row


def _patch_spans(config: Qwen2VLConfig, rows: Sequence[_Row], total: int) -> dict[str, np.ndarray]:
    plans = [[plan_image(run.grid, config.vision) for run, _ in row.seen] for row in rows]
    full = [segments([n for plan in row for n in plan.slices], total) for row in plans]
    windows = [segments([n for plan in row for n in plan.windows], total) for row in plans]
    made = {"patch": full, "window": windows} if config.vision.window else {"patch": full}
    return {f"{name}_start": np.stack([spans.start for spans in each]) for name, each in made.items()} | {
        f"{name}_end": np.stack([spans.end for spans in each]) for name, each in made.items()
    }


def _fill_patches(
    config: Qwen2VLConfig, rows: Sequence[_Row], batch: dict[str, np.ndarray]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Write the pixels in stored order; the places of patches and units in the order of transformers."""
    patch_slots: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    unit_slots: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for b, row in enumerate(rows):
        at = 0
        for run, pixels in row.seen:
            plan, size = plan_image(run.grid, config.vision), config.vision.unit_patches
            batch["patches"][b, at : at + len(pixels)] = pixels[plan.order]
            batch["patch_positions"][b, at : at + len(pixels)] = plan.positions
            video = run.seconds_per_slice is not None
            patch_slots[video] += [(b, slot) for slot in range(at, at + len(pixels))]
            unit_slots[video] += [(b, at // size + int(unit)) for unit in plan.unit_of_token]
            at += len(pixels)
    both = [np.array(slots[False] + slots[True], np.int64).reshape(-1, 2).T for slots in (patch_slots, unit_slots)]
    return (both[0][0], both[0][1]), (both[1][0], both[1][1])


def _theirs(
    config: Qwen2VLConfig, rows: Sequence[_Row], batch: dict[str, np.ndarray], real: np.ndarray
) -> dict[str, np.ndarray]:
    ids = batch["tokens"].astype(np.int64)
    types = np.where(ids == config.image_token, 1, 0) + np.where(ids == config.video_token, 2, 0)
    made: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": real.astype(np.int64),
        "mm_token_type_ids": np.where(real, types, 0),
    }
    seen = [item for row in rows for item in row.seen]
    for video, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [(run, values) for run, values in seen if (run.seconds_per_slice is not None) == video]
        if chosen:
            made[pixels] = np.concatenate([values for _, values in chosen])
            made[grids] = np.array([run.grid for run, _ in chosen], np.int64)
        if chosen and video and config.family == "2.5":
            made["second_per_grid_ts"] = np.array([run.seconds_per_slice for run, _ in chosen], np.float32)
    return made
