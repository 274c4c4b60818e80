"""LoRA and DoRA beside PEFT on tiny Hugging Face models of both families: states, logits and every gradient."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from cocoa_jax.checkpoints.huggingface import read_folder, write_folder
from cocoa_jax.checkpoints.peft import load_adapter, save_adapter
from cocoa_jax.models import low_rank
from cocoa_jax.models.config import read_config
from cocoa_jax.models.lora import AdapterRecord, adapted_graph, column_norms, join, merge
from cocoa_jax.models.qwen2_vl import Compute, abstract_params, bind, graph_of
from cocoa_jax.objectives.masked_text import masked_text_loss

# Two float32 implementations that sum in another order, relative to the largest number of a tensor.
STATES = 1e-5
GRADIENTS = 1e-5
ROWS = (154, 155)  # the bridge and the mask token of the golden batch; both occur in it
MASK = "bridged"
TARGETS = r".*(layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj)|blocks\.\d+\.(attn\.qkv|mlp\.(fc[12]|\w+_proj)))"
# Family, whether it is DoRA, whether the head is tied to the embedding.
CASES = {"dora": ("qwen2", True, True), "lora": ("qwen2", False, True), "untied dora": ("qwen2_5", True, False)}


def error(got, want) -> float:
    """Largest difference relative to the largest wanted number."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


@dataclasses.dataclass
class Case:
    """A base on disk, a random adapter that PEFT wrote beside it, and what PEFT made of the golden batch."""

    folder: object
    sizes: object
    batch: object
    base: dict
    record: AdapterRecord
    adapter: dict
    hidden: np.ndarray
    logits: np.ndarray
    gradients: dict


def hf_model(folder, sizes):
    kind = Qwen2_5_VLForConditionalGeneration if sizes.family == "2.5" else Qwen2VLForConditionalGeneration
    return kind.from_pretrained(folder, attn_implementation="eager")


def hf_forward(model, batch):
    """States after the final norm, logits and the masked-text loss, as the golden files were made."""
    files = batch.files
    tensor = {name: torch.tensor(files[name]) for name in ("pixel_values", "image_grid_thw", "position_ids", "labels")}
    seen = np.where(files[f"{MASK}.allow"], 0.0, np.finfo(np.float32).min).astype(np.float32)
    out = model(
        input_ids=torch.tensor(files["input_ids_masked"]),
        attention_mask=torch.tensor(seen)[:, None],
        position_ids=tensor["position_ids"],
        pixel_values=tensor["pixel_values"],
        image_grid_thw=tensor["image_grid_thw"],
        output_hidden_states=True,
        use_cache=False,
    )
    scores, labels = out.logits[:, :-1].flatten(0, 1), tensor["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(scores, labels, ignore_index=-100)
    return out.hidden_states[-1], out.logits, loss


def base_folder(golden, folder, family, tied):
    """The golden weights as a folder of the hub; with a random head where it is not tied."""
    folder.mkdir()
    config = json.loads((golden / f"{family}.config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(golden / f"{family}.hub.safetensors", folder / "model.safetensors")
    if tied:
        return folder
    sizes = read_config(folder)
    params = read_folder(folder, abstract_params(sizes))
    head = np.random.default_rng(0).standard_normal((sizes.text.width, sizes.text.vocab_size), np.float32)
    params["text"]["head"] = {"kernel": 0.1 * head}
    other = folder.with_name("untied")
    other.mkdir()
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (other / "config.json").write_text(json.dumps(config))
    made = folder.with_name("untied-whole")
    write_folder(made, params, other)
    return made


@pytest.fixture(scope="module")
def case_of(golden, golden_batch, tmp_path_factory):
    @functools.cache
    def make(name: str) -> Case:
        family, dora, tied = CASES[name]
        tmp = tmp_path_factory.mktemp("peft")
        folder = base_folder(golden, tmp / "base", family, tied)
        sizes, batch = read_config(folder), golden_batch(family, "right")
        config = PeftConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.0,
            use_dora=dora,
            target_modules=TARGETS,
            trainable_token_indices=list(ROWS),
        )
        model = get_peft_model(hf_model(folder, sizes), config)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        for key, p in trained:
            noise = torch.randn(p.shape, generator=generator)
            p.data = p.data * (1 + 0.2 * noise) if "magnitude" in key else p.data + 0.1 * noise
        model.save_pretrained(tmp / "adapter")
        hidden, logits, loss = hf_forward(model, batch)
        loss.backward()
        for _, p in trained:  # gradients, in the layout of an adapter
            p.data = p.grad
        model.save_pretrained(tmp / "gradients")
        record, adapter = load_adapter(tmp / "adapter", sizes)
        gradients = load_adapter(tmp / "gradients", sizes)[1]
        base = read_folder(folder, abstract_params(sizes))
        found = (hidden.detach().numpy(), logits.detach().numpy(), gradients)
        return Case(folder, sizes, batch, base, record, adapter, *found)

    return make


@functools.cache
def adapted(sizes, record, mutation=""):
    """Jitted (base, adapter, inputs, at, ids) -> states, logits and gradients of an adapted backbone."""
    del mutation
    graph, _ = adapted_graph(sizes, Compute(), record.config, record.rows)

    def loss(adapter, base, inputs, at, ids):
        model = bind(graph, join(base, adapter, column_norms(base, adapter, record.config.scale)))
        hidden = model(inputs)
        return masked_text_loss(model, hidden, at, ids)[0], (hidden, model.logits(hidden))

    return jax.jit(jax.grad(loss, has_aux=True))


def differences(case, mutation="") -> dict[str, float]:
    real = case.batch.real
    run = adapted(case.sizes, case.record, mutation)
    gradients, (hidden, logits) = run(case.adapter, case.base, case.batch.inputs(MASK), *case.batch.wanted_text())
    got, want = flatten_dict(gradients, sep="."), flatten_dict(case.gradients, sep=".")
    assert got.keys() == want.keys()
    return {
        "hidden": error(hidden[real], case.hidden[real]),
        "logits": error(logits[real], case.logits[real]),
        **{path: error(got[path], want[path]) for path in want},
    }


@pytest.mark.parametrize("name", CASES)
def test_states_logits_and_every_gradient_are_pefts(case_of, name):
    case = case_of(name)
    _, dora, _ = CASES[name]
    found = differences(case)
    # All seven maps of a text layer, the joint map and the MLP of a vision layer; and the rows.
    maps = 7 + (4 if case.sizes.family == "2.5" else 3)
    assert len(found) == 2 + maps * (3 if dora else 2) + 1
    assert found["hidden"] <= STATES and found["logits"] <= STATES, found
    assert max(found.values()) <= GRADIENTS, found


@pytest.mark.slow  # compiles the model once more; the formula itself is tested in test_lora
def test_the_gradient_does_not_pass_through_the_norm(case_of, monkeypatch):
    case = case_of("dora")
    monkeypatch.setattr(low_rank.jax.lax, "stop_gradient", lambda x: x)
    found = differences(case, "norm")
    assert found["hidden"] <= STATES and max(found.values()) > 100 * GRADIENTS


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_ours_loads_in_peft_and_gives_the_same_states(case_of, tmp_path, name):
    case = case_of(name)
    config = dataclasses.replace(case.record.config, dropout=0.1)  # off in evaluation
    save_adapter(
        tmp_path / "adapter", case.adapter, AdapterRecord(config, case.record.rows), case.sizes, str(case.folder)
    )
    model = PeftModel.from_pretrained(hf_model(case.folder, case.sizes), tmp_path / "adapter").eval()
    with torch.no_grad():
        hidden, logits, _ = hf_forward(model, case.batch)
    real = case.batch.real
    # The same numbers in the same library.
    np.testing.assert_array_equal(hidden.numpy()[real], case.hidden[real])
    np.testing.assert_array_equal(logits.numpy()[real], case.logits[real])
    record, adapter = load_adapter(tmp_path / "adapter", case.sizes)
    assert record == AdapterRecord(dataclasses.replace(config, targets=record.config.targets), ROWS)
    jax.tree.map(np.testing.assert_array_equal, adapter, case.adapter)


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_give_the_same_states_here_and_in_transformers(case_of, tmp_path, name):
    case, real = case_of(name), case_of(name).batch.real
    whole = merge(case.base, case.adapter, case.record.config, case.record.rows)
    write_folder(tmp_path / "merged", whole, case.folder)
    with torch.no_grad():
        hidden, logits, _ = hf_forward(hf_model(tmp_path / "merged", case.sizes), case.batch)
    assert error(hidden.numpy()[real], case.hidden[real]) <= STATES
    assert error(logits.numpy()[real], case.logits[real]) <= STATES
    untouched = flatten_dict(case.base, sep=".")
    changed = {path for path, leaf in flatten_dict(whole, sep=".").items() if not np.array_equal(leaf, untouched[path])}
    places = {path.rsplit(".", 1)[0] for path in flatten_dict(case.adapter, sep=".")}
    assert changed == {f"{path}.{'table' if path == 'text.embed' else 'kernel'}" for path in places}
    if name == "dora":
        graph, _ = graph_of(case.sizes)
        ours = jax.jit(lambda params, inputs: bind(graph, params)(inputs))(whole, case.batch.inputs(MASK))
        assert error(ours[real], case.hidden[real]) <= STATES
