"""The shape that a batch gets changes what a step costs, and nothing else."""

import dataclasses

import jax
import numpy as np
import pytest

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.pairs import picture_source
from cocoa_jax.data.pipeline import STATS, stage_dataset
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.sources import load_pictures
from cocoa_jax.training.stages import stage_program

TOLERANCE = 1e-5  # float32, summed in another order
WIDE, NARROW = (8, 96, 64), (20, 48, 32)


def rows(*shapes) -> RowsConfig:
    # 5 hidden tokens a row: the budget of stage 2 is full, and what it un-chooses must not depend on the row.
    return RowsConfig(batch_size=8, shapes=shapes, examples_per_row=3, masked_per_row=5)


@pytest.mark.parametrize("stage", ["warmup", "bridge", "contrastive"])
def test_the_same_examples_give_the_same_loss_in_every_shape(backbone, stage_settings, tmp_path, stage):
    config = parse(TrainConfig, stage_settings(stage, backbone, tmp_path))
    opened = open_backbone(backbone)
    # Every row has to hold the longest example: where text is cut depends on the widest row of all shapes.
    settings = dataclasses.replace(config.data.processor, max_text_tokens=12)
    processor = Processor.load(opened.side_files, opened.config, settings)
    source = {"it": picture_source(next(iter(config.data.kinds)), load_pictures("validation"))}
    program = stage_program(config, opened.config)
    params = {"backbone": opened.load()}
    params["head"] = program.init_head(params["backbone"])
    loss = jax.jit(lambda params, batch: program.loss(params, batch, 1.0)[0])
    found = []
    for shapes in [(WIDE,), (NARROW,)]:
        batches = stage_dataset(
            dataclasses.replace(config.batches(), rows=rows(*shapes)), source, {"it": 1.0}, processor, seed=2, steps=2
        )
        for step in range(2):
            batch = batches[step]
            assert (*batch["tokens"].shape, batch["patches"].shape[1]) == shapes[0]
            if stage == "bridge":
                assert batch["stats"][STATS.index("dropped_masks")] > 0
            del batch["stats"]
            found.append(float(loss(params, batch)))
    assert loss._cache_size() == 2
    first = np.array(found).reshape(2, 2)
    assert abs(first[0, 0] - first[0, 1]) > 1e-3  # the steps differ, or equality would say nothing
    np.testing.assert_allclose(first[1], first[0], rtol=TOLERANCE)


def test_there_are_as_many_compilations_as_shapes(backbone, stage_settings, tmp_path):
    """Batches of two kinds of pairs that need different shapes, in turn."""
    config = parse(TrainConfig, stage_settings("contrastive", backbone, tmp_path))
    opened = open_backbone(backbone)
    processor = Processor.load(opened.side_files, opened.config, config.data.processor)
    settings = dataclasses.replace(config.batches(), rows=rows((8, 48, 32), (20, 64, 32)))
    sources = {kind: picture_source(kind, load_pictures("validation")) for kind in ("caption", "flat-3d")}
    program = stage_program(config, opened.config)
    params = {"backbone": opened.load(), "head": {}}
    loss = jax.jit(lambda params, batch: program.loss(params, batch, 1.0)[0])
    batches = stage_dataset(settings, sources, {"caption": 1.0, "flat-3d": 1.0}, processor, seed=0, steps=4)
    seen = set()
    for batch in batches:
        assert batch["stats"][STATS.index("extra_rows")] == 0
        seen.add((*batch["tokens"].shape, batch["patches"].shape[1]))
        del batch["stats"]
        loss(params, batch)
    assert seen == set(settings.rows.shapes) and loss._cache_size() == 2


def test_stage_1_takes_text_alone_in_a_shape_without_patches(backbone, stage_settings, tmp_path):
    """Its loss and gradient are those of the same text in a shape that leaves all patches empty."""
    config = parse(TrainConfig, stage_settings("warmup", backbone, tmp_path))
    opened = open_backbone(backbone)
    processor = Processor.load(opened.side_files, opened.config, config.data.processor)
    source = {"it": picture_source("warmup", load_pictures("validation"))}
    batch = stage_dataset(config.batches(), source, {"it": 1.0}, processor, seed=2, steps=1)[0]
    del batch["stats"]
    of_patches = [name for name in batch if "patch" in name or name in ("hidden_unit", "unit_seed")]
    assert len(of_patches) == 6
    batch["unit"] = np.full_like(batch["unit"], -1)
    unused = batch | {name: np.zeros_like(batch[name]) for name in of_patches}
    without = batch | {name: batch[name][:, :0] for name in of_patches}
    program = stage_program(config, opened.config)
    params = {"backbone": opened.load()}
    params["head"] = program.init_head(params["backbone"])
    step = jax.jit(jax.value_and_grad(lambda params, batch: program.loss(params, batch, 1.0)[0]))
    (want, gradient), (loss, found) = step(params, unused), step(params, without)
    np.testing.assert_allclose(loss, want, rtol=TOLERANCE)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)
