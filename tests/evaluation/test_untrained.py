"""Beside the model that training began with, whose tokenizer lacks a bridge token that only training brought."""

import numpy as np
import pytest

from cocoa_jax.checkpoints.added_tokens import add_to_tokenizer
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.orbax import backbone_folder
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorError
from cocoa_jax.data.sources import Content
from cocoa_jax.embedder import Embedder, default_settings
from cocoa_jax.evaluation import probe, run
from cocoa_jax.evaluation.tasks import Task

TOKENS = ["<|im_end|>", "<|bridge_1|>"]
TEXTS = tuple(map(Content, ("a kiwi fruit", "two small boats", "dark skin tone")))


@pytest.fixture(scope="module")
def stage(published, stage_settings, leave_stage, tmp_path_factory):
    """The folder of a stage 3 with a bridge token of its own, which the backbone that it began with lacks."""
    settings = stage_settings("contrastive", published, tmp_path_factory.mktemp("new") / "3-contrastive")
    settings["data"]["processor"]["bridge_tokens"] = TOKENS
    folder, backbone = leave_stage(settings), open_backbone(published)
    processor = Processor.load(published, backbone.config, default_settings(folder).processor)
    add_to_tokenizer(backbone_folder(folder), processor.added)
    return folder


def test_a_stage_with_a_new_bridge_token_is_scored_beside_its_backbone(stage, published, tmp_path, monkeypatch):
    task = Task("same", "retrieval", "test_unseen", TEXTS, TEXTS, tuple(frozenset([i]) for i in range(3)))
    monkeypatch.setattr(run, "picture_tasks", lambda split: [task])
    found = run.evaluate(stage, tmp_path, ["test_unseen"])
    assert found.results["config"]["untrained"] == str(published)
    # Nothing was trained between them, and each content is its own answer.
    assert found.results["tasks"]["same"]["p_at_1"] == found.results["tasks"]["same"]["untrained_p_at_1"] == 1


def test_the_probe_embeds_with_it_too(stage, published):
    geometry = probe._geometry(published, default_settings(stage), (TEXTS, TEXTS), lambda count: None)
    assert geometry["alignment"] == pytest.approx(0, abs=1e-9)


def test_what_it_lacks_is_the_mean_of_what_it_has(stage, published):
    settings = default_settings(stage)
    with pytest.raises(ProcessorError, match=r"its tokenizer lacks \['<\|bridge_1\|>'\] of bridge_tokens"):
        Embedder(published, settings)
    backbone = open_backbone(published)
    processor = Processor.load(backbone.side_files, backbone.config, settings.processor)
    before = np.asarray(backbone.load()["text"]["embed"]["table"])
    after = np.asarray(Embedder(published, settings, untrained=True)._params["text"]["embed"]["table"])
    row = processor.added["<|bridge_1|>"]
    np.testing.assert_allclose(after[row], before[: processor.used_rows].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.delete(after, row, 0), np.delete(before, row, 0))
    assert not np.array_equal(after[row], before[row])
