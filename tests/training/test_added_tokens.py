"""All stages from a checkpoint as it is published, whose tokenizer has no mask token."""

import dataclasses

import numpy as np
import pytest
from transformers import AutoTokenizer

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.convert import orbax_to_hf
from cocoa_jax.checkpoints.huggingface import read_folder
from cocoa_jax.checkpoints.orbax import base_folder, load_params, read_metadata
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorError
from cocoa_jax.embedder import Embedder, default_settings
from cocoa_jax.models.qwen2_vl import abstract_params
from cocoa_jax.training.loop import train

FEW = {"loop": {"steps": 3, "checkpoint_every": 1}}


def run(settings) -> TrainConfig:
    config = parse(TrainConfig, settings)
    train(config)
    return config


@pytest.fixture(scope="module")
def warmed(published, stage_settings, tmp_path_factory):
    """Stage 1 with an adapter."""
    output = tmp_path_factory.mktemp("added") / "1-warmup"
    lora = {"lora": {"rank": 2, "targets": [r"text\.layers\.attention\.q_proj"], "base_dtype": "float32"}}
    run(stage_settings("warmup", published, output, **FEW, **lora))
    return output


def table_of(params) -> np.ndarray:
    return np.asarray(params["text"]["embed"]["table"])


def test_the_row_begins_as_the_mean_and_trains_beside_an_adapter(published, warmed):
    config = open_backbone(published).config
    mask = used = len(AutoTokenizer.from_pretrained(published))
    shapes = abstract_params(config)
    before, base = table_of(read_folder(published, shapes)), table_of(load_params(base_folder(warmed), shapes))
    np.testing.assert_allclose(base[mask], before[:used].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.delete(base, mask, 0), np.delete(before, mask, 0))
    assert read_metadata(warmed)["parent"]["added"] == {"<|mask|>": mask}  # for exports
    record, adapter = open_backbone(warmed).adapter()
    place = record.rows.index(mask)
    assert np.abs(np.asarray(adapter["text"]["embed"]["rows"])[place] - base[mask]).max() > 1e-5


def test_the_next_stages_take_it_as_it_is_and_so_does_transformers(warmed, stage_settings, tmp_path):
    run(stage_settings("bridge", warmed, tmp_path / "2-bridge", **FEW))
    run(stage_settings("contrastive", tmp_path / "2-bridge", tmp_path / "3-contrastive", **FEW))
    orbax_to_hf(tmp_path / "3-contrastive", tmp_path / "hub")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    mask = tokenizer.convert_tokens_to_ids("<|mask|>")
    last = open_backbone(tmp_path / "3-contrastive")
    processor = Processor.load(last.side_files, last.config, default_settings(last.path).processor)
    assert not processor.added and processor.mask_id == mask == len(tokenizer) - 1


def test_a_run_goes_on_where_it_was(published, stage_settings, tmp_path):
    longer = {"loop": {"steps": 4, "checkpoint_every": 2}}
    whole = run(stage_settings("warmup", published, tmp_path / "whole", **longer))
    begun = stage_settings("warmup", published, tmp_path / "begun", **longer)
    run(begun)
    (tmp_path / "begun" / "checkpoints" / "4").rename(tmp_path / "gone")
    run(begun)
    shapes = abstract_params(open_backbone(published).config)
    np.testing.assert_array_equal(
        table_of(load_params(tmp_path / "begun", shapes)), table_of(load_params(whole.output, shapes))
    )


def test_nothing_is_hidden_where_one_embeds_and_an_untrained_bridge_means_nothing(published):
    (row,) = Embedder.load(published).embed([{"text": "a kiwi"}])
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)
    settings = default_settings(published)
    processor = dataclasses.replace(settings.processor, bridge_tokens=("<|im_edn|>",))
    with pytest.raises(ProcessorError, match=r"its tokenizer lacks \['<\|im_edn\|>'\] of bridge_tokens"):
        Embedder.load(published, dataclasses.replace(settings, processor=processor))
