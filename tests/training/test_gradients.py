"""Every parameter belongs to a group of gradients, and the groups make up the whole."""

import jax
import numpy as np
import optax
import pytest
from sizes import config_values

from cocoa_jax.models.config import parse_config
from cocoa_jax.models.lora import LoraConfig, adapted_graph
from cocoa_jax.models.mae import decoder_graph
from cocoa_jax.models.qwen2_vl import Compute, abstract_params
from cocoa_jax.training.gradients import group_norms, group_of
from cocoa_jax.training.sharding import path_of


def test_every_parameter_has_a_group():
    sizes = parse_config(config_values("2.5", "tiny", tied=False))
    head, adapter = decoder_graph(sizes)[1], adapted_graph(sizes, Compute(), LoraConfig(), (1, 2))[1]
    params = {"backbone": abstract_params(sizes), "head": head, "adapter": adapter}
    found = {path_of(keys): group_of(path_of(keys)) for keys, _ in jax.tree.leaves_with_path(params)}
    assert set(found.values()) == {"text", "vision", "embeddings", "head", "adapter"}
    assert found["backbone/text/head/kernel"] == found["backbone/text/embed/table"] == "embeddings"
    assert found["backbone/vision/merger/fc1/kernel"] == "vision" and found["backbone/text/norm/scale"] == "text"
    with pytest.raises(KeyError, match="no group of gradients for parameter backbone/audio/scale"):
        group_of("backbone/audio/scale")


def test_the_norms_of_all_groups_make_up_the_norm_of_all():
    rng = np.random.default_rng(0)
    text = {"embed": {"table": rng.standard_normal(3)}, "norm": {"scale": rng.standard_normal(4)}}
    gradients = {"backbone": {"text": text, "vision": {"a": rng.standard_normal(5)}}, "head": {"b": np.ones(9)}}
    norms = group_norms(gradients)
    assert set(norms) == {f"gradient_norm_{name}" for name in ("text", "vision", "embeddings", "head")}
    assert norms["gradient_norm_head"] == 3
    np.testing.assert_allclose(np.linalg.norm(list(norms.values())), optax.tree.norm(gradients), rtol=1e-6)
