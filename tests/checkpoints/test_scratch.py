"""A backbone from scratch is a Qwen2-VL to everything that reads one."""

import functools
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.huggingface import read_folder
from cocoa_jax.checkpoints.scratch import SPECIAL_TOKENS, ScratchConfig, make_backbone, train_tokenizer
from cocoa_jax.models.config import read_config
from cocoa_jax.models.qwen2_vl import abstract_params

SMALL = ScratchConfig(vocab_size=400, width=64, layers=2, heads=2, mlp_width=96, vision_width=32, vision_layers=2)
TEXTS = [
    f"a {color} {thing} with a {color} hat, naïve café {number}"
    for number, color, thing in itertools.product(range(9), ("red", "green", "blue"), ("kiwi", "dog", "boat"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scratch") / "backbone"
    make_backbone(path, SMALL, TEXTS, abstract_params)
    return path


@functools.cache
def tokenizer_of(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def file_tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_transformers_loads_every_weight_and_no_other(folder):
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], (kind, report[kind])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ours = read_folder(folder, abstract_params(read_config(folder)))
    theirs = dict(model.named_parameters())
    kernel = theirs["model.language_model.layers.1.mlp.up_proj.weight"].detach().numpy()
    np.testing.assert_array_equal(ours["text"]["layers"]["mlp"]["up_proj"]["kernel"][1], kernel.T)
    ids = torch.tensor([tokenizer_of(folder)("a red kiwi").input_ids])
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_the_config_is_read_alike_by_transformers_and_by_us(folder):
    theirs, ours = Qwen2VLConfig.from_pretrained(folder), read_config(folder)
    assert theirs.text_config.rope_parameters["mrope_section"] == list(ours.text.mrope_sections) == [4, 6, 6]
    assert theirs.text_config.vocab_size == ours.text.vocab_size == 448
    assert theirs.vision_config.embed_dim == ours.vision.width == 32
    assert ours.text.tied_head and theirs.tie_word_embeddings
    assert (ours.vision.patch_size, ours.vision.merge_size, ours.vision.temporal_patch_size) == (14, 2, 2)


def test_default_sections_are_those_of_the_head_width():
    assert ScratchConfig().mrope_sections == (8, 12, 12)
    assert ScratchConfig(width=256, heads=2).mrope_sections == (16, 24, 24)


def test_special_tokens_are_single_and_known_to_the_config(folder):
    tokenizer, config = tokenizer_of(folder), read_config(folder)
    assert type(tokenizer).__name__ in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    ids = [tokenizer(text).input_ids for text in SPECIAL_TOKENS]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(SPECIAL_TOKENS)
    assert max(one[0] for one in ids) < config.text.vocab_size
    assert set(SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    marks = tokenizer("<|vision_start|><|image_pad|><|video_pad|><|vision_end|>").input_ids
    assert marks == [config.vision_start_token, config.image_token, config.video_token, config.vision_end_token]
    mixed = tokenizer("a<|mask|>dog<|im_end|>").input_ids
    assert mixed.count(tokenizer.convert_tokens_to_ids("<|mask|>")) == 1


def test_training_texts_become_few_tokens(folder):
    tokenizer = tokenizer_of(folder)
    assert len(tokenizer) <= SMALL.vocab_size
    assert tokenizer.tokenize("a red kiwi with") == ["a", "Ġred", "Ġkiwi", "Ġwith"]


@settings(max_examples=60, deadline=None)
@example(text="½ e\u0301 ﬁ")  # changed by NFKC, by NFC, and not at all by NFC
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(folder, text):
    tokenizer = tokenizer_of(folder)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(index < SMALL.vocab_size for index in ids)
    # transformers 5 sets the tokenizer up by itself, others take tokenizer.json as it is.
    assert file_tokenizer_of(folder).encode(text).ids == ids


def test_the_preprocessor_is_the_ordinary_one(folder):
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert type(AutoImageProcessor.from_pretrained(folder)).__name__.startswith("Qwen2VLImageProcessor")
    for size, tokens in (((20, 20), 1), ((56, 84), 6), ((2000, 1000), 32)):
        features = processor(Image.new("RGB", size, "red"), return_tensors="np")
        grid = features["image_grid_thw"][0]
        assert features["pixel_values"].shape == (grid.prod(), 1176)
        assert grid.prod() // 4 <= 32 and (grid.prod() // 4 == tokens or size[0] == 2000)


def test_weights_have_the_scale_of_their_inputs(folder):
    leaves = flatten_dict(read_folder(folder, abstract_params(read_config(folder))), sep=".")
    for path, leaf in leaves.items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
        elif path.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        else:
            wanted = 0.02 if path.endswith("table") else leaf.shape[-2] ** -0.5
            assert abs(leaf.std() / wanted - 1) < 0.05, path  # over 1,000 draws each: about two per cent
    gate, up = (leaves[f"text.layers.mlp.{name}_proj.kernel"] for name in ("gate", "up"))
    assert not np.array_equal(gate[0], gate[1]) and not np.array_equal(gate, up)


def test_the_same_seed_gives_the_same_bytes_and_another_other_weights(folder, tmp_path):
    make_backbone(tmp_path / "again", SMALL, TEXTS, abstract_params)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert {"config.json", "merges.txt", "model.safetensors", "preprocessor_config.json"} < set(names)
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    other = ScratchConfig(**{**SMALL.__dict__, "seed": 1})
    make_backbone(tmp_path / "other", other, TEXTS, abstract_params)
    assert (folder / "config.json").read_bytes() == (tmp_path / "other" / "config.json").read_bytes()
    assert (folder / "model.safetensors").read_bytes() != (tmp_path / "other" / "model.safetensors").read_bytes()


def test_bytes_are_enough_when_there_are_no_texts():
    tokenizer = train_tokenizer([], 300)
    assert tokenizer.get_vocab_size() == 256 + len(SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer.encode("kiwi 🥝").ids) == "kiwi 🥝"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 200}, "bytes and special tokens take 265"),
        ({"heads": 5}, "multiple of 16"),
        ({"width": 24, "heads": 1}, "multiple of 16"),
        ({"min_pixels": 0}, "must be positive"),
        ({"min_pixels": 10**6}, "at most 25088"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        ScratchConfig(**change)


def test_config_json_is_the_flat_form(folder):
    values = json.loads((folder / "config.json").read_text())
    assert values["hidden_size"] == 64 and "text_config" not in values
