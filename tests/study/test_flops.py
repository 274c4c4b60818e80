"""Counted FLOPs of a step: against the compiler's own count, by shape, and by the kinds of a stage."""

import dataclasses

import jax
import pytest

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.data.packing import Shape
from cocoa_jax.data.processor import Processor
from cocoa_jax.profiling.steps import abstract_step
from cocoa_jax.study.flops import batch_flops, step_flops
from cocoa_jax.training.mesh import make_mesh


def settings(stage_settings, stage, backbone, tmp_path, **data):
    given = stage_settings(stage, backbone, tmp_path, compute={"remat": "none", "attention": "reference"})
    return parse(TrainConfig, {**given, "data": {**given["data"], **data}})


@pytest.mark.parametrize("stage", ["warmup", "bridge", "pictures", "contrastive"])
def test_the_count_is_that_of_the_compiler(stage, backbone, stage_settings, tmp_path):
    """Norms, softmax and the optimiser are not counted and the lowest maps need no gradient to their input: within 15 %
    of the compiler's count at widths at which products are nearly all of the work."""
    sizes = open_backbone(backbone).config
    # One layer each: the compiler counts the body of a loop once.
    text = dataclasses.replace(sizes.text, layers=1, width=256, mlp_width=1024, head_width=128)
    vision = dataclasses.replace(sizes.vision, layers=1, width=256, mlp_width=1024, out_width=256)
    sizes = dataclasses.replace(sizes, text=text, vision=vision)
    pictures = {"masking": {"text_ratio": 0.5, "image_ratio": 0.5}} if stage == "pictures" else {}
    stage = "bridge" if stage == "pictures" else stage
    config = settings(stage_settings, stage, backbone, tmp_path, **pictures)
    mesh = make_mesh(config.mesh)
    step, state, batch = abstract_step(config, sizes, mesh)
    with jax.set_mesh(mesh):
        counted = step.lower(state, batch).compile().cost_analysis()["flops"]
    assert batch_flops(config, sizes, config.data.rows.widest) == pytest.approx(counted, rel=0.15)


def test_twice_the_rows_cost_twice_as_much(backbone, stage_settings, tmp_path):
    sizes, config = open_backbone(backbone).config, settings(stage_settings, "warmup", backbone, tmp_path)
    one, two = (batch_flops(config, sizes, Shape(rows, 48, 32)) for rows in (8, 16))
    assert two == pytest.approx(2 * one) and batch_flops(config, sizes, Shape(8, 48, 0)) < one


def test_a_step_costs_the_mean_of_its_kinds(backbone, stage_settings, tmp_path):
    rows = {"batch_size": 8, "examples_per_row": 2, "masked_per_row": 8, "shapes": [[8, 48, 64], [16, 48, 64]]}
    opened = open_backbone(backbone)
    costs = {}
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.75, 0.25)):
        kinds = {"caption": weights[0], "tile": weights[1]}
        config = settings(
            stage_settings, "contrastive", backbone, tmp_path, kinds={k: w for k, w in kinds.items() if w}, rows=rows
        )
        processor = Processor.load(opened.side_files, opened.config, config.data.processor)
        costs[weights] = step_flops(config, processor)
    assert costs[0.75, 0.25] == pytest.approx(0.75 * costs[1.0, 0.0] + 0.25 * costs[0.0, 1.0])
