"""What the head of stage 1 makes of hidden parts of pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.orbax import load_trees, read_metadata
from cocoa_jax.config import EvaluateConfig, evaluate_config_of
from cocoa_jax.data.masking import Purpose, choose_units, example_rng
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.prompts import plain
from cocoa_jax.data.rows import hide_units, write_rows
from cocoa_jax.data.sources import Content, Picture
from cocoa_jax.data.vision_plan import Grid, plan_image
from cocoa_jax.evaluation.report_data import Reconstruction
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.mae import decoder_graph
from cocoa_jax.models.qwen2_vl import bind, graph_of
from cocoa_jax.objectives.warmup import hide_units as add_noise
from cocoa_jax.objectives.warmup import token_of_unit
from cocoa_jax.training.mesh import make_mesh, replicated
from cocoa_jax.training.sharding import param_shardings

SIDE = 112  # pixels of the longer side at least, so that a small picture can be seen


def draw_hidden(stage: Path, pictures: Sequence[Picture], seed: int) -> list[Reconstruction]:
    """Hides units of pictures as the warm-up did, lets its head draw them, and puts the drawing into the picture.

    A picture stands beside its caption, of which no word is hidden.

    Raises:
        CheckpointError: `stage` holds no checkpoint of a warm-up.
    """
    trained = read_metadata(stage)["config"]
    settings, backbone = evaluate_config_of(trained), open_backbone(stage)
    processor = Processor.load(backbone.side_files, backbone.config, settings.processor)
    contents = [Content(plain(picture.caption), (picture.image,)) for picture in pictures]
    widest, slots = settings.rows.widest, settings.rows.examples_per_row
    examples = {i: processor.warmup(content, widest.tokens) for i, content in enumerate(contents)}
    rows = [[i] for i in examples]  # one picture a row: its units are the first of the row
    batch = write_rows(examples, rows, processor, widest, slots, settings.visibility, truncated=False)
    size, ratio = backbone.config.vision.unit_patches, trained["data"]["masking"]["image_ratio"]
    units = {
        i: choose_units(example.patches // size, example_rng(seed, 0, i, Purpose.UNITS), ratio)
        for i, example in examples.items()
    }
    hide_units(batch, examples, rows, units, size)
    if trained["warmup"].get("noise") == "shared":
        batch["unit_seed"][:] = seed
    shown, drawn = _run(stage, backbone.config, settings, batch)
    filled = np.where(np.repeat(batch["hidden_unit"], size, axis=1)[..., None], drawn, shown)
    made = []
    for i, picture in enumerate(pictures):
        grid = examples[i].grids[0]
        original, masked, whole = (
            _enlarged(to_pixels(rows[i, : examples[i].patches], grid, processor))
            for rows in (batch["patches"], shown, filled)
        )
        made.append(Reconstruction(picture.caption, original, masked, whole))
    return made


def to_pixels(patches: Float32[np.ndarray, "n C"], grid: Grid, processor: Processor) -> UInt8[np.ndarray, "h w 3"]:
    """The picture that stored patches came from: the inverse of `Processor.fill_patches` for one still picture.

    What lies outside the range of colours is cut; of the temporal slices, equal in a true picture, the mean is taken.
    """
    _, rows, columns = grid
    pixels = processor.pixels
    size, merge = pixels.patch_size, pixels.merge_size
    ordered = patches[np.argsort(plan_image(grid, processor.config.vision).order)]
    blocks = ordered.reshape(
        rows // merge, columns // merge, merge, merge, 3, pixels.temporal_patch_size, size, size
    ).mean(axis=5)
    picture = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * size, columns * size, 3)
    low, high = pixels.table[:, 0], pixels.table[:, 255]  # the table is a straight line for each colour
    return np.clip(np.round(255 * (picture - low) / (high - low)), 0, 255).astype(np.uint8)


def _run(
    stage: Path, config: Qwen2VLConfig, settings: EvaluateConfig, batch: Mapping[str, np.ndarray]
) -> tuple[Float32[np.ndarray, "B P C"], Float32[np.ndarray, "B P C"]]:
    """The patches that the model saw, and those that its head drew."""
    mesh = make_mesh(settings.mesh)
    graph, shapes = graph_of(config, settings.compute)
    head_graph, head_shapes = decoder_graph(config, settings.compute.attention)
    both = {"backbone": shapes, "head": head_shapes}
    wanted = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), both, param_shardings(both, mesh)
    )
    params = {
        "backbone": open_backbone(stage).load(wanted["backbone"]),
        "head": load_trees(stage, {"head": wanted["head"]})["head"],
    }

    def draw(params: Any, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        model, decoder = bind(graph, params["backbone"]), bind(head_graph, params["head"])
        inputs = Inputs.from_batch(batch)
        shown = add_noise(inputs.patches, batch["hidden_unit"], batch["unit_seed"])
        hidden = model(dataclasses.replace(inputs, patches=shown))
        columns = token_of_unit(inputs.unit, batch["hidden_unit"].shape[1])
        return shown, decoder(hidden, inputs.positions, inputs.spans, columns).reshape(shown.shape)

    run: Callable[..., Any] = jax.jit(draw, out_shardings=replicated(mesh))
    shown, drawn = jax.device_get(run(params, jax.device_put(dict(batch), replicated(mesh))))
    return shown, drawn.astype(np.float32)


def _enlarged(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    height, width, _ = picture.shape
    scale = SIDE / max(height, width)
    if scale <= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
