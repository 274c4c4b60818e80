"""Pictures in block B of stage 2: what is hidden, who sees it, and what the loss makes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoa_jax.attention.spans import Spans
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.data.pairs import picture_source
from cocoa_jax.data.pipeline import stage_dataset
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.sources import load_pictures
from cocoa_jax.objectives.bridge import bridge_picture_loss
from cocoa_jax.objectives.warmup import WarmupConfig
from cocoa_jax.training.stages import stage_program

KINDS = {"bridge": 0.5, "bridge-picture": 0.25, "bridge-from-words": 0.25}


@pytest.fixture
def settings_of(backbone, stage_settings, tmp_path):
    def make(kinds, image_ratio=0.5, strict=False, weight=0.5):
        settings = stage_settings("bridge", backbone, tmp_path, warmup={"mae_weight": weight})
        rows = {"batch_size": 8, "examples_per_row": 1, "masked_per_row": 16, "shapes": [[8, 64, 64]]}
        masking = {"text_ratio": 0.5, "image_ratio": image_ratio}
        settings["data"] |= {"kinds": kinds, "rows": rows, "masking": masking, "visibility": {"strict_bridge": strict}}
        return parse(TrainConfig, settings)

    return make


@pytest.fixture
def batch_of(backbone):
    opened = open_backbone(backbone)

    def make(config, step=0):
        processor = Processor.load(opened.side_files, opened.config, config.data.processor)
        sources = {kind: picture_source(kind, load_pictures("validation")) for kind in config.data.kinds}
        batch = stage_dataset(config.batches(), sources, config.data.kinds, processor, seed=4, steps=step + 1)[step]
        return {name: x for name, x in batch.items() if name != "stats"} | {"step": np.int32(0)}

    return make


def units_behind(batch) -> np.ndarray:
    """Which units of each row stand behind its bridge."""
    behind = np.zeros(batch["hidden_unit"].shape, bool)
    for row, e in enumerate(batch["pool"][:, 0, 0]):
        units = batch["unit"][row, e + 1 :] if e >= 0 else np.zeros(0, int)
        behind[row, units[units >= 0]] = True
    return behind


def test_only_units_of_block_b_are_hidden_and_one_of_them_is(settings_of, batch_of):
    for ratio in (0.01, 0.5):
        batch = batch_of(settings_of(KINDS, ratio))
        behind = units_behind(batch)
        assert behind.any(1).sum() == 4 and (batch["unit"] >= 0).any(1).sum() > 4  # the others show theirs in block A
        assert not batch["hidden_unit"][~behind].any()
        assert (batch["hidden_unit"].any(1) == behind.any(1)).all()
        # Words of block B, or parts of its picture: no record is without.
        assert ((batch["predict_id"] >= 0).any(1) != behind.any(1)).all()


@pytest.mark.parametrize("strict", [False, True])
def test_block_b_sees_the_bridge_and_itself(settings_of, batch_of, strict):
    batch = batch_of(settings_of({"bridge-picture": 1.0}, strict=strict))
    mask = Spans(batch["token_start"], batch["token_end"]).as_mask(64)
    for row, e in enumerate(batch["pool"][:, 0, 0]):
        end = int((batch["token_end"][row] > 0).sum())
        assert (batch["unit"][row, :e] >= 0).any() and (batch["unit"][row, e:end] >= 0).any()
        expected = np.zeros((64, 64), bool)
        expected[:e, : e + 1] = expected[e + 1 : end, e:end] = expected[e, : (e + 1 if strict else end)] = True
        np.testing.assert_array_equal(mask[row], expected)


def test_what_is_rebuilt_hears_of_block_a_through_the_bridge_alone(backbone, settings_of, batch_of):
    """The gradient of the loss by block A's pixels is zero once block B cannot see the bridge, and is not before."""
    config = settings_of({"bridge-picture": 1.0})
    batch, opened = batch_of(config), open_backbone(backbone)
    program = stage_program(config, opened.config)
    params = program.first_params(opened.load())

    slope = jax.jit(jax.grad(lambda patches, given: program.loss(params, {**given, "patches": patches}, 0.0)[0]))

    def by_pixels(**more):
        given = {**batch, **more}
        return np.abs(slope(given.pop("patches"), given)).reshape(*batch["hidden_unit"].shape, -1).max(-1)

    t, e = np.arange(64), batch["pool"][:, 0]
    cut = np.where((t > e) & (batch["token_end"] > 0), np.maximum(batch["token_start"], e + 1), batch["token_start"])
    behind, used = units_behind(batch), batch["patch_end"][:, ::4] > 0
    assert (by_pixels()[used & ~behind] > 0).all()
    found = by_pixels(token_start=cut.astype(np.int32))
    assert not found[used & ~behind].any() and (found[used & behind] > 0).all()


def test_the_loss_is_words_plus_weighted_pictures_and_trains_the_decoder(backbone, settings_of, batch_of):
    opened = open_backbone(backbone)
    found = {}
    for weight in (0.0, 0.3):
        config = settings_of(KINDS, weight=weight)
        batch, program = batch_of(config), stage_program(config, opened.config)
        params = program.first_params(opened.load())

        loss = jax.jit(jax.value_and_grad(program.loss, has_aux=True))
        (value, metrics), gradient = loss(params, batch, 0.0)
        np.testing.assert_allclose(value, metrics["bridge"] + weight * metrics["mae"], rtol=1e-6)
        found[weight] = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient["head"]))
    assert found[0.0] == 0 and found[0.3] > 0 and metrics["mae"] > 0.1 and metrics["bridge"] > 1


def test_true_pixels_of_hidden_units_are_in_no_input(settings_of, batch_of):
    """Other pixels where units are hidden: the target moves and nothing that the model is given."""

    class Seen(Exception):
        pass

    class Model:
        def __call__(self, inputs):
            self.inputs = inputs
            raise Seen

    def given(batch):
        model = Model()
        with pytest.raises(Seen):
            bridge_picture_loss(model, lambda *_: None, batch, WarmupConfig())
        return [np.asarray(leaf) for leaf in jax.tree.leaves(model.inputs)]

    batch = batch_of(settings_of({"bridge-picture": 1.0}))
    patches = batch["patches"].reshape(*batch["hidden_unit"].shape, -1)
    other = np.where(batch["hidden_unit"][..., None], -patches - 1, patches).reshape(batch["patches"].shape)
    assert (other != batch["patches"]).any()
    for one, changed in zip(given(batch), given({**batch, "patches": other}), strict=True):
        np.testing.assert_array_equal(one, changed)


def test_without_a_ratio_there_is_no_decoder_and_a_picture_is_refused(backbone, settings_of, batch_of):
    opened = open_backbone(backbone)
    config = settings_of({"bridge": 1.0}, image_ratio=0.0)
    assert not stage_program(config, opened.config).shapes["head"] and "hidden_unit" not in batch_of(config)
    with pytest.raises(ValueError, match=r"block B holds 1 pictures .* masking\.image_ratio"):
        batch_of(settings_of({"bridge-picture": 1.0}, image_ratio=0.0))
    moving = dataclasses.replace(config.data.masking, final_image_ratio=0.5)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, masking=moving))
    assert stage_program(config, opened.config).shapes["head"]
