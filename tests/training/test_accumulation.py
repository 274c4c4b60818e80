"""Stages 1 and 2 in chunks of rows: loss, metrics and gradients of the whole batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.data.pairs import picture_source
from cocoa_jax.data.pipeline import stage_dataset
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.sources import load_pictures
from cocoa_jax.training.accumulation import accumulated
from cocoa_jax.training.stages import stage_program
from cocoa_jax.training.state import trained_part


@pytest.fixture(params=["warmup", "bridge", "pictures", "lora"])
def case(request, backbone, stage_settings, tmp_path):
    """Settings, parameters and a batch whose rows hold unlike numbers of hidden tokens."""
    stage = "warmup" if request.param == "warmup" else "bridge"
    more = {"lora": {"rank": 4, "dropout": 0.0}} if request.param == "lora" else {}
    settings = stage_settings(stage, backbone, tmp_path, **more)
    if request.param == "pictures":
        settings["data"] |= {"kinds": {"bridge": 0.5, "bridge-from-words": 0.5}}
        settings["data"]["masking"] = {"text_ratio": 0.5, "image_ratio": 0.5}
    config = parse(TrainConfig, settings)
    opened = open_backbone(backbone)
    processor = Processor.load(opened.side_files, opened.config, config.data.processor)
    sources = {kind: picture_source(kind, load_pictures("validation")) for kind in config.data.kinds}
    batch = stage_dataset(config.batches(), sources, config.data.kinds, processor, seed=2, steps=1)[0]
    del batch["stats"]
    program = stage_program(config, opened.config, (382, 383))
    return config, opened.config, program.first_params(opened.load()), {**batch, "step": np.int32(0)}


def run(config, sizes, params, batch, rows):
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, chunk_rows=rows))
    program = stage_program(config, sizes, (382, 383))

    def loss(part, batch):
        return program.loss({**params, **part}, batch, 0.5)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(trained_part(params), batch)


def test_chunks_give_the_loss_metrics_and_gradients_of_the_whole_batch(case):
    config, sizes, params, batch = case
    counts = (batch["predict_id"] >= 0).reshape(4, -1).sum(axis=1)
    assert len(set(counts.tolist())) > 1  # or a mean of the chunks' means would do
    (whole, metrics), gradients = run(config, sizes, params, batch, None)
    (loss, found), got = run(config, sizes, params, batch, 2)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    assert found.keys() == metrics.keys() and found["masked_tokens"] == counts.sum()
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    largest = max(jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(gradients))
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(gradients), strict=True):
        # To 1e-5 of itself, or of the largest for the biases of keys, whose gradient is zero but for rounding.
        limit = 1e-5 * np.linalg.norm(other) + 1e-7 * largest
        assert np.linalg.norm(one - other) <= limit, jax.tree_util.keystr(path)


def test_chunks_that_do_not_divide_the_rows_are_refused(case):
    with pytest.raises(ValueError, match=r"chunk_rows is 3, a device has 8 rows: choose a divisor"):
        run(*case, 3)


def test_one_chunk_of_all_rows_is_the_batch_itself(case):
    config, sizes, params, batch = case
    (whole, _), _ = run(config, sizes, params, batch, None)
    assert run(config, sizes, params, batch, 8)[0][0] == whole


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("wide", "tolerance"), [(False, 1e-5), (True, 1e-10)])
def test_gradients_add_up_to_rounding(rows, wide, tolerance):
    """With numbers that are twice as long it is 1e-10: what is left in the float32 of a model is rounding alone."""
    rng = np.random.default_rng(6)
    predict = np.where(rng.random((6, 5)) < 0.4, 1, -1).astype(np.int32)
    batch = {"tokens": rng.integers(0, 9, (6, 5)).astype(np.int32), "predict_id": predict}
    with jax.enable_x64(wide):
        kind = jnp.float64 if wide else jnp.float32
        table = jnp.asarray(rng.standard_normal((9, 4)), kind)
        backbone = {"table": table, "kernel": jnp.asarray(rng.standard_normal((4, 4)), kind)}

        def loss(params, batch, progress):
            rows = jnp.take(params["backbone"]["table"], batch["tokens"], axis=0) @ params["backbone"]["kernel"]
            chosen = batch["predict_id"] >= 0
            each = jnp.sum(jnp.tanh(rows) ** 2, axis=-1) + jnp.mean(rows, axis=(1, 2))[:, None]
            total = batch.get("masked_total", jnp.sum(chosen))
            return jnp.sum(each * chosen) / total * progress, {}

        def run(loss):
            return jax.jit(jax.value_and_grad(lambda part: loss({"backbone": part}, batch, 0.5)[0]))(backbone)

        got, want = run(accumulated(loss, rows)), run(loss)
        assert want[0].dtype == kind
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
