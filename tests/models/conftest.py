"""The golden batches as rows of this project: everything that Hugging Face computes from sizes, given as arrays."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cocoa_jax.attention.spans import Spans, bidirectional, causal, truncated
from cocoa_jax.checkpoints.huggingface import read_folder
from cocoa_jax.data.vision_plan import plan_image
from cocoa_jax.models.config import Qwen2VLConfig, parse_config
from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.qwen2_vl import abstract_params

ROW_OF_IMAGE = (0, 0, 1)  # row 0 shows two pictures, row 1 one, row 2 none
PATCHES = 88  # slots of a row: the 84 of row 0 and one empty unit
EOS = 154


@dataclasses.dataclass(frozen=True)
class Golden:
    """What Hugging Face was given and gave (``files``), and the same input in our form.

    ``unit_of_image_token``: (row, stored unit) of every image token of the batch in reading order; ``patch_slots``:
    (row, slot) of every patch in the order of ``vision_last_hidden``.
    """

    config: Qwen2VLConfig
    files: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]
    real: np.ndarray
    unit_of_image_token: tuple[np.ndarray, np.ndarray]
    patch_slots: tuple[np.ndarray, np.ndarray]

    def inputs(self, mask: str, **changes: Any) -> Inputs:
        """The input under one of the masks causal, bidir, bridged."""
        seen = self.spans(mask)
        return Inputs.from_batch({**self.batch, "token_start": seen.start, "token_end": seen.end, **changes})

    def spans(self, mask: str) -> Spans:
        segment, bridge = np.zeros((2, *self.real.shape), np.int32), np.zeros((2, *self.real.shape), np.int32)
        for row, real in enumerate(self.real):
            columns = np.flatnonzero(real)
            at = np.flatnonzero(self.files["segment_ids"][row] == 2)[0]
            segment[0, row, columns], segment[1, row, columns] = columns[0], columns[-1] + 1
            bridge[0, row, columns], bridge[1, row, columns] = at, at + 1
        whole = Spans(*segment)
        made = {"causal": causal(whole), "bidir": bidirectional(whole), "bridged": truncated(whole, Spans(*bridge))}
        return made[mask]

    def wanted_text(self) -> tuple[np.ndarray, np.ndarray]:
        """predict_at and predict_id of the labels: the shifted form, position i is predicted at i - 1."""
        labels = self.files["labels"]
        at, ids = np.full((2, len(labels), int((labels >= 0).sum(1).max())), -1, np.int32)
        for row, line in enumerate(labels):
            columns = np.flatnonzero(line >= 0)
            at[row, : len(columns)], ids[row, : len(columns)] = columns - 1, line[columns]
        return at, ids


def _lay_out(config: Qwen2VLConfig, files: dict[str, np.ndarray]) -> Golden:
    vision, rows = config.vision, len(files["input_ids"])
    shapes = {"patches": (vision.patch_values,), "patch_positions": (2,)}
    shapes |= {name: () for name in ("patch_start", "patch_end", "window_start", "window_end")}
    types = {"patches": np.float32}
    batch = {name: np.zeros((rows, PATCHES, *shape), types.get(name, np.int32)) for name, shape in shapes.items()}
    units, slots, filled, source = [], [], [0] * rows, 0
    for row, grid in zip(ROW_OF_IMAGE, files["image_grid_thw"].tolist(), strict=True):
        plan, at = plan_image(tuple(grid), vision), filled[row]
        count = len(plan.order)
        here = slice(at, at + count)
        batch["patches"][row, here] = files["pixel_values"][source : source + count][plan.order]
        batch["patch_positions"][row, here] = plan.positions
        batch["patch_start"][row, here], batch["patch_end"][row, here] = at, at + count
        for name, lengths in (("window", plan.windows),):
            ends = at + np.cumsum(lengths, dtype=np.int32)
            batch[f"{name}_start"][row, at : at + sum(lengths)] = np.repeat(ends - lengths, lengths)
            batch[f"{name}_end"][row, at : at + sum(lengths)] = np.repeat(ends, lengths)
        units += [(row, at // vision.unit_patches + unit) for unit in plan.unit_of_token]
        slots += [(row, slot) for slot in range(at, at + count)]
        filled[row], source = at + count, source + count
    if not vision.window:
        del batch["window_start"], batch["window_end"]
    shown = tuple(np.array(units).T)
    images = files["input_ids"] == config.image_token
    unit = np.full(images.shape, -1, np.int32)
    unit[images] = shown[1]  # both walk the rows in order, and each row from the left
    batch |= {"tokens": files["input_ids_masked"].astype(np.int32), "unit": unit}
    batch["positions"] = files["position_ids"].transpose(1, 2, 0).astype(np.int32)
    return Golden(config, files, batch, files["segment_ids"] > 0, shown, tuple(np.array(slots).T))


@pytest.fixture(scope="session")
def config_of(golden: Path) -> Callable[[str], Qwen2VLConfig]:
    return lambda family: parse_config(json.loads((golden / f"{family}.config.json").read_text()))


@pytest.fixture(scope="session")
def golden_batch(golden: Path, config_of: Callable[[str], Qwen2VLConfig]) -> Callable[[str, str], Golden]:
    """golden_batch(family, padding side)."""

    @functools.cache
    def load(family: str, side: str) -> Golden:
        with np.load(golden / f"{family}.{side}.npz") as files:
            return _lay_out(config_of(family), dict(files))

    return load


@pytest.fixture(scope="session")
def golden_params(
    golden: Path, config_of: Callable[[str], Qwen2VLConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The golden weights of a family, read as a checkpoint is read."""

    @functools.cache
    def load(family: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(family)
        shutil.copy(golden / f"{family}.config.json", folder / "config.json")
        shutil.copy(golden / f"{family}.hub.safetensors", folder / "model.safetensors")
        return read_folder(folder, abstract_params(config_of(family)))

    return load
