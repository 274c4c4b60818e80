"""A published checkpoint knows no mask token: it gets one, in a row that starts as the mean of those in use."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from cocoa_jax.checkpoints.added_tokens import add_to_tokenizer, with_mean_rows
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.models.config import read_config

MORE = ProcessorConfig(bridge_tokens=("<|im_end|>", "<|second|>"))
TEXT = "a kiwi <|mask|> fruit <|second|>"


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json", "saved"])
def test_programs_that_read_the_folder_know_the_same_ids_and_nothing_else_changes(published, form, tmp_path):
    folder = tmp_path / "copy"
    if form == "saved":  # by transformers 5, whose tokenizer_config.json lists no added tokens
        AutoTokenizer.from_pretrained(published).save_pretrained(folder)
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copyfile(published / name, folder / name)
        assert "added_tokens_decoder" not in json.loads((folder / "tokenizer_config.json").read_text())
    else:
        shutil.copytree(published, folder)
    if form == "vocab.json":
        (folder / "tokenizer.json").unlink()
    config, before = read_config(folder), AutoTokenizer.from_pretrained(folder)
    planned = Processor.load(folder, config, MORE)
    assert set(planned.added) == {"<|mask|>", "<|second|>"}
    add_to_tokenizer(folder, planned.added)
    after = AutoTokenizer.from_pretrained(folder)
    assert {name: after.convert_tokens_to_ids(name) for name in planned.added} == planned.added
    assert len(after) == len(before) + 2 and after.decode(planned.mask_id) == "<|mask|>"
    assert after.decode([planned.mask_id], skip_special_tokens=True) == ""
    known = before.backend_tokenizer.get_added_tokens_decoder()
    assert {row: after.convert_ids_to_tokens(row) for row in known} == {
        row: token.content for row, token in known.items()
    }
    words = "the red car <|vision_start|> on a hill<|im_end|>"
    assert after(words)["input_ids"] == before(words)["input_ids"]
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    written = Processor.load(folder, config, MORE)
    assert not written.added and written.fingerprint() == planned.fingerprint()
    assert written.token_ids(TEXT) == planned.token_ids(TEXT)
    assert (written.mask_id, written.bridge_ids) == (planned.mask_id, planned.bridge_ids)


def test_a_tokenizer_that_would_number_a_token_otherwise_is_refused(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"'<\|mask\|>' would be token \d+ of .*, not 7"):
        add_to_tokenizer(folder, {"<|mask|>": 7})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_the_mean_of_those_in_use_and_no_other_changes(dtype):
    table = np.asarray(jnp.asarray(np.random.default_rng(0).normal(1, 1, (9, 4)), dtype))
    params = {"text": {"embed": {"table": jnp.asarray(table)}, "norm": {"scale": jnp.ones(4)}}, "vision": {}}
    filled = with_mean_rows(params, (8, 7), 6)
    new = np.asarray(filled["text"]["embed"]["table"])
    mean = table[:6].astype(np.float32).mean(0)
    np.testing.assert_allclose(new[7:].astype(np.float32), [mean, mean], rtol=1e-6 if dtype == "float32" else 1e-2)
    np.testing.assert_array_equal(new[:7], table[:7])
    assert filled.keys() == params.keys() and filled["text"]["norm"] is params["text"]["norm"]
    assert with_mean_rows(filled, (), 6) is filled
