"""PEFT folders: both layouts of names, one tensor per layer, and one error that lists all that is wrong."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cocoa_jax.checkpoints import peft
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from cocoa_jax.models.config import parse_config
from cocoa_jax.models.lora import TARGETS, AdapterRecord, LoraConfig, adapted_graph, adapted_maps
from cocoa_jax.models.qwen2_vl import Compute, abstract_params

PREFIX = "base_model.model.model."
Q0 = f"{PREFIX}language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sizes_of(golden):
    return lambda family: parse_config(json.loads((golden / f"{family}.config.json").read_text()))


@pytest.fixture(scope="module")
def made(sizes_of):
    """made(family, ...) -> a record and an adapter of random numbers."""

    def make(family, rows=(155, 154), **settings):
        record = AdapterRecord(LoraConfig(rank=3, alpha=6.0, tokens=bool(rows), **settings), rows)
        _, shapes = adapted_graph(sizes_of(family), Compute(), record.config, rows)
        rng = np.random.default_rng(0)
        return record, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)

    return make


@pytest.fixture
def folder(made, sizes_of, tmp_path):
    """An adapter of family 2 on disk."""
    record, adapter = made("qwen2")
    save_adapter(tmp_path / "adapter", adapter, record, sizes_of("qwen2"), "some/base")
    return tmp_path / "adapter"


def rewrite(folder, change):
    """Change the tensors of an adapter by name."""
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(change(tensors), folder / WEIGHTS_FILE)


def reconfigure(folder, **values):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5"])
@pytest.mark.parametrize("dora", [True, False])
def test_out_and_in_again_it_is_the_same(made, sizes_of, tmp_path, family, dora):
    # Out of order on purpose, and a map that is not stacked.
    record, adapter = made(family, dora=dora, targets=(*TARGETS, r"vision\.merger\.fc2"))
    save_adapter(tmp_path / "a", adapter, record, sizes_of(family))
    read, again = load_adapter(tmp_path / "a", sizes_of(family))
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    assert read.rows == (155, 154) and read.config.scale == record.config.scale and read.config.dora == dora
    assert read.config.dropout == 0.1


def test_one_tensor_per_layer_under_the_names_of_transformers_5(folder, made, sizes_of):
    _, adapter = made("qwen2")
    tensors, text = load_file(folder / WEIGHTS_FILE), sizes_of("qwen2").text
    assert tensors[f"{Q0}.lora_A.weight"].shape == (3, text.width)
    q = adapter["text"]["layers"]["attention"]["q_proj"]
    for layer in range(text.layers):
        name = Q0.replace("layers.0", f"layers.{layer}")
        np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], q["b"][layer].T)
        np.testing.assert_array_equal(tensors[f"{name}.lora_magnitude_vector"], q["magnitude"][layer])
    rows = tensors[f"{PREFIX}language_model.embed_tokens.token_adapter.trainable_tokens_delta"]
    np.testing.assert_array_equal(rows, adapter["text"]["embed"]["rows"])
    assert f"{PREFIX}visual.blocks.0.mlp.fc1.lora_A.weight" in tensors
    assert len(tensors) == 3 * (7 * text.layers + 3 * sizes_of("qwen2").vision.layers) + 1


@pytest.mark.parametrize(
    "targets", [TARGETS, (r"text\.layers\.mlp\.down_proj",), (r"vision\.layers\.mlp\.up_proj", r"vision\.merger\.fc2")]
)
def test_peft_is_told_to_adapt_these_maps_and_no_others(made, sizes_of, tmp_path, targets):
    """Both towers of 2.5 have maps of one name, of which an adapter may have those of one tower alone."""
    sizes = sizes_of("qwen2_5")
    record, adapter = made("qwen2_5", targets=targets)
    save_adapter(tmp_path / "a", adapter, record, sizes)
    pattern = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["target_modules"]
    adapted, fitting = adapted_maps(abstract_params(sizes), record.config), 0
    for name, module in peft._modules(sizes).items():
        for spelled in (name, peft._newer(name)):
            assert bool(re.fullmatch(pattern, spelled)) == (module.path in adapted), spelled
            fitting += module.path in adapted
    assert fitting >= 2


def test_names_of_the_older_layout_and_of_a_named_adapter_are_read_too(folder, made, sizes_of):
    def older(name):
        name = name.replace(f"{PREFIX}language_model.", PREFIX).replace(f"{PREFIX}visual.", "base_model.model.visual.")
        return name.replace(".lora_A.weight", ".lora_A.default.weight")

    rewrite(folder, lambda tensors: {older(name): tensor for name, tensor in tensors.items()})
    assert not [name for name in load_file(folder / WEIGHTS_FILE) if "language_model" in name]
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, sizes_of("qwen2"))[1], made("qwen2")[1])


def test_other_spellings_of_the_settings(folder, sizes_of):
    reconfigure(folder, trainable_token_indices={"embed_tokens": [155, 154]}, use_rslora=True, lora_alpha=4)
    record, _ = load_adapter(folder, sizes_of("qwen2"))
    assert record.rows == (155, 154) and record.config.scale == pytest.approx(4 / 3**0.5)


# -------------------------------------------------------------------------------------------------------- bad input


def refused(folder, sizes, *words):
    with pytest.raises(CheckpointError) as caught:
        load_adapter(folder, sizes)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    return str(caught.value)


def test_everything_that_is_wrong_stands_in_one_error(folder, sizes_of):
    reconfigure(folder, rank_pattern={"q_proj": 4}, bias="all", modules_to_save=["lm_head"], init_lora_weights="pissa")

    def change(tensors):
        del tensors[f"{Q0}.lora_B.weight"]
        tensors[f"{Q0}.lora_A.weight"] = np.zeros((4, 9), np.float32)
        tensors[f"{PREFIX}language_model.layers.99.mlp.up_proj.lora_A.weight"] = np.zeros((3, 4), np.float32)
        tensors["base_model.model.lm_head.weight"] = np.zeros((2, 2), np.float32)
        tensors[f"{PREFIX}layers.1.mlp.up_proj.lora_A.weight"] = np.zeros((3, 4), np.float32)  # the same one, older
        return tensors

    rewrite(folder, change)
    refused(
        folder,
        sizes_of("qwen2"),
        "rank_pattern is {'q_proj': 4}",
        "bias is 'all'",
        "modules_to_save is ['lm_head']",
        "init_lora_weights is 'pissa'",
        "layers.0.self_attn.q_proj.lora_B: missing, wanted [64, 3]",
        "layers.0.self_attn.q_proj.lora_A: shape [4, 9], wanted [3, 64]",
        "layers.99.mlp.up_proj.lora_A: unexpected",
        "lm_head.weight: unexpected",
        "the same tensor is there twice",
        "(9 problems)",
    )


def test_an_adapter_of_another_base_is_refused(folder, sizes_of):
    refused(folder, sizes_of("qwen2_5"), "visual.blocks.0.mlp.fc1.lora_A: unexpected")
    sizes = sizes_of("qwen2")
    wider = dataclasses.replace(sizes, text=dataclasses.replace(sizes.text, mlp_width=112))
    told = refused(folder, wider, "mlp.up_proj.lora_magnitude_vector: shape [96], wanted [112]")
    assert told.count("wanted") == 5 * sizes.text.layers  # gate and up: B and magnitude; down: A
    deeper = dataclasses.replace(sizes, text=dataclasses.replace(sizes.text, layers=4))
    assert refused(folder, deeper, "layers.3.mlp.up_proj.lora_A: missing").count("missing") == 7 * 3
    fewer = dataclasses.replace(sizes, text=dataclasses.replace(sizes.text, vocab_size=155))
    refused(folder, fewer, "[155, 154] are not different ids below 155")


def test_lora_with_magnitudes_and_dora_without_are_refused(folder, sizes_of):
    reconfigure(folder, use_dora=False)
    refused(folder, sizes_of("qwen2"), "layers.0.self_attn.q_proj.lora_magnitude_vector: unexpected")
    reconfigure(folder, use_dora=True)
    rewrite(folder, lambda tensors: {name: x for name, x in tensors.items() if not name.endswith("_vector")})
    refused(folder, sizes_of("qwen2"), "layers.0.self_attn.q_proj.lora_magnitude_vector: missing, wanted [64]")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_damaged_folder_is_refused(folder, sizes_of, name, damage):
    path = folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    refused(folder, sizes_of("qwen2"), name, "cannot be read")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": True}, "r = True, expected a whole number from 1"),
        ({"r": 10**12}, "r = 1000000000000, expected a whole number from 1"),
        (
            {"lora_alpha": None, "lora_dropout": "x"},
            "lora_alpha = None, expected a number above 0 and has lora_dropout",
        ),
        ({"lora_alpha": [1]}, "lora_alpha = [1]"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0, expected a number from 0 to below 1"),
        ({"use_dora": 1}, "use_dora = 1, expected true or false"),
        ({"use_rslora": "no"}, "use_rslora = 'no', expected true or false"),
        ({"trainable_token_indices": 5}, "trainable_token_indices is 5, expected a list of ids"),
        ({"trainable_token_indices": {"embed_tokens": 5}}, "trainable_token_indices is 5, expected a list of ids"),
        ({"trainable_token_indices": [[1], 2]}, "[[1], 2] are not different ids"),
        ({"trainable_token_indices": [155, 155]}, "[155, 155] are not different ids"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "trainable_token_indices of lm_head, only of embed_tokens"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ],
    ids=str,
)
def test_what_is_no_lora_is_refused(folder, sizes_of, values, words):
    reconfigure(folder, **values)
    refused(folder, sizes_of("qwen2"), words)


CHANGES_WHAT_IS_COMPUTED = {
    "alpha_pattern": {"q_proj": 2},
    "layer_replication": [[0, 1]],
    "target_parameters": ["a"],
    "megatron_config": {"a": 1},
    "arrow_config": {"a": 1},
    "layers_to_transform": [0],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "use_bdlora": {"a": 1},
    "kasa_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "velora_config": {"a": 1},
    "fan_in_fan_out": True,
    "lora_bias": True,
    "init_lora_weights": "olora",
}


def test_no_setting_that_changes_what_is_computed_is_passed_over(folder, sizes_of):
    reconfigure(folder, **CHANGES_WHAT_IS_COMPUTED)
    told = refused(
        folder, sizes_of("qwen2"), *(f"{name} is {value!r}" for name, value in CHANGES_WHAT_IS_COMPUTED.items())
    )
    assert f"({len(CHANGES_WHAT_IS_COMPUTED)} problems)" in told


def test_every_setting_of_peft_is_known():
    """A new release may bring a switch that changes what an adapter computes; it has to be looked at once."""
    import peft as library

    harmless = {"auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "runtime_config", "task_type"}
    harmless |= {"peft_version", "ensure_weight_tying"}
    chooses_maps = {"target_modules", "exclude_modules", "layers_pattern"}  # the names of the tensors say which
    read = {*peft._FORMS, "trainable_token_indices"}
    of_beginnings = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}  # see init_lora_weights
    of_others = {"megatron_core", "qalora_group_size"}  # of megatron_config and use_qalora, which are refused
    known = {*peft._PLAIN, *harmless, *chooses_maps, *read, *of_beginnings, *of_others}
    assert {field.name for field in dataclasses.fields(library.LoraConfig)} <= known


def test_a_taken_destination_is_left_alone(folder, made, sizes_of):
    record, adapter = made("qwen2")
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match="not empty"):
        save_adapter(folder, adapter, record, sizes_of("qwen2"))
    assert sorted(folder.iterdir()) == before


def test_an_interrupted_save_leaves_nothing(made, sizes_of, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError("No space left on device")

    monkeypatch.setattr(peft, "save_file", full)
    record, adapter = made("qwen2")
    with pytest.raises(OSError, match="No space"):
        save_adapter(tmp_path / "adapter", adapter, record, sizes_of("qwen2"))
    assert not list(tmp_path.iterdir())
