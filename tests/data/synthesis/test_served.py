"""Against a real server: `transformers serve` with a tiny random model, which knows texts alone."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from cocoa_jax.config import load_mixture
from cocoa_jax.data.mixture import open_mixture
from cocoa_jax.data.synthesis.endpoint import EndpointConfig, EndpointError
from cocoa_jax.data.synthesis.filters import FilterConfig
from cocoa_jax.data.synthesis.pictures import open_subjects
from cocoa_jax.data.synthesis.plan import TextsConfig
from cocoa_jax.data.synthesis.prompts import Prompt
from cocoa_jax.data.synthesis.run import synthesize

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
START = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Qwen2 of random weights whose words are those of two sentences."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant: say this in other words", "a kiwi is a fruit"] * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=304, num_key_value_heads=2, eos_token_id=1, pad_token_id=0, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model):
    """The address of a server of that model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", START, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = model.parent / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_a_real_server_writes_rows(url, model, tmp_path, to_lines):
    to_lines(tmp_path / "pairs.jsonl", [{"q": f"kiwi number {i}", "a": "a fruit"} for i in range(6)])
    values = "datasets: {words: {format: table, path: pairs.jsonl, columns: {query_text: q, target_text: a}}}"
    (tmp_path / "m.yaml").write_text(values)
    # A random model says nothing in any language, and as long as it may.
    filters = FilterConfig(language=False, cut=False, overlap=1.0, repetition=1.0, repeats=0)
    prompt = Prompt("Say this in other words: {words}", "{words}", shortest=1, picture=False)
    texts = TextsConfig(["again"], own={"again": prompt}, filters=filters, tries=4)
    endpoint = EndpointConfig(str(model), url, concurrency=2, max_tokens=12, temperature=1.0)
    said: list[str] = []
    made = synthesize(open_subjects(["m"], {"m": load_mixture(tmp_path / "m.yaml")}), endpoint, texts, tmp_path / "out",
                      said.append)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert made.rows == len(rows) == 6 and said[0].startswith("estimate from the sizes of some pictures: 6 requests")
    for row in rows:
        assert row["qry"].startswith("kiwi number") and row["pos_text"]
        assert row["tokens_in"] > 10 and 0 < row["tokens_out"] <= 12
        assert row["finish"] in ("stop", "length") and str(model) in row["model"]
    assert len({row["pos_text"] for row in rows}) > 1
    assert len(open_mixture(load_mixture(tmp_path / "out" / "mixture.yaml"), "bridge").sources["synthetic"]) == 6


@pytest.mark.slow
def test_its_word_about_a_wrong_model_is_passed_on(url, tmp_path, to_lines):
    to_lines(tmp_path / "pairs.jsonl", [{"q": f"kiwi number {i}", "a": "a fruit"} for i in range(6)])
    values = "datasets: {words: {format: table, path: pairs.jsonl, columns: {query_text: q, target_text: a}}}"
    (tmp_path / "m.yaml").write_text(values)
    endpoint = EndpointConfig("another", url, stop_after=3)
    with pytest.raises(EndpointError, match=r"3 requests in a row .*status 400.*requested 'another'"):
        synthesize(open_subjects(["m"], {"m": load_mixture(tmp_path / "m.yaml")}), endpoint, TextsConfig(["rephrase"]),
                   tmp_path / "out", lambda line: None)  # fmt: skip
    assert not (tmp_path / "out" / "rejected.jsonl").read_text(), "another time the model may be there"
