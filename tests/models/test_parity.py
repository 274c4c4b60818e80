"""Both families against Hugging Face: golden files of float32 eager attention, two paddings, three masks."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cocoa_jax.checkpoints.hub_layout import hub_key, plan
from cocoa_jax.models import layers, vision
from cocoa_jax.models.mae import ImageDecoder, decoder_graph, init_decoder
from cocoa_jax.models.qwen2_vl import Compute, bind, graph_of
from cocoa_jax.objectives.contrastive import embed_examples
from cocoa_jax.objectives.masked_text import masked_text_loss
from cocoa_jax.objectives.warmup import picture_loss

FAMILIES, SIDES, MASKS = ("qwen2", "qwen2_5"), ("left", "right"), ("causal", "bidir", "bridged")
CASES = list(itertools.product(FAMILIES, SIDES, MASKS))
# Two float32 implementations that sum in another order; of the largest activation of a layer.
STATES = 2e-5
LOSS = 1e-5
GRADIENTS = 1e-4


def run(graph, params, inputs):
    """Everything that Hugging Face shows of a forward pass."""
    model = bind(graph, params)
    spans = (inputs.patch_spans, inputs.window_spans)
    seen, _ = model.vision.states(inputs.patches, inputs.patch_positions, *spans, remat="none")
    last, entered = model.states(inputs)
    hidden = model.text.norm(last)
    return {
        "vision_last_hidden": seen,
        "vision_merged": model.vision.merger(seen),
        "hidden": jnp.concatenate([entered, hidden[None]]),
        "logits": model.logits(hidden),
        "without_norm": last,
    }


@functools.cache
def forward(config, tag=""):
    """The jitted forward pass of a config; ``tag`` keeps what was compiled under a mutation apart."""
    del tag
    graph, _ = graph_of(config)
    return jax.jit(functools.partial(run, graph))


def error(got, want) -> float:
    """Largest difference relative to the largest wanted number."""
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def differences(batch, got, mask) -> dict[str, float]:
    """Relative error of each thing in ``got``, padding left out."""
    real, files = batch.real, batch.files
    found = {
        "vision_last_hidden": error(got["vision_last_hidden"][batch.patch_slots], files["vision_last_hidden"]),
        "vision_merged": error(got["vision_merged"][batch.unit_of_image_token], files["vision_merged"]),
        "logits": error(got["logits"][real], files[f"{mask}.logits"][real]),
    }
    for layer, want in enumerate(files[f"{mask}.hidden"]):
        found[f"hidden{layer}"] = error(got["hidden"][layer][real], want[real])
    return found


@pytest.mark.parametrize(("family", "side", "mask"), CASES)
def test_every_state_and_the_logits(golden_batch, golden_params, family, side, mask):
    batch = golden_batch(family, side)
    inputs = batch.inputs(mask)
    np.testing.assert_array_equal(inputs.spans.as_mask(batch.real.shape[1]), batch.files[f"{mask}.allow"])
    got = forward(batch.config)(golden_params(family), inputs)
    assert all(np.isfinite(x).all() for x in got.values())
    found = differences(batch, got, mask)
    assert len(found) == 7 and max(found.values()) <= STATES, found


@functools.cache
def text_loss(config, compute=Compute()):  # noqa: B008 (frozen)
    graph, _ = graph_of(config, compute)

    def loss(params, inputs, at, ids):
        model = bind(graph, params)
        return masked_text_loss(model, model(inputs), at, ids)[0]

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(("family", "side", "mask"), CASES)
def test_masked_loss_and_the_gradient_of_every_parameter(golden_batch, golden_params, family, side, mask):
    batch, params = golden_batch(family, side), golden_params(family)
    loss, gradients = text_loss(batch.config)(params, batch.inputs(mask), *batch.wanted_text())
    assert abs(loss - batch.files[f"{mask}.mntp_loss"]) <= LOSS
    vision = batch.config.vision
    patch = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    leaves = flatten_dict(gradients, sep=".")
    ours = {
        key: np.linalg.norm(np.float64(leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer]))
        for key, slot in plan(params, patch).items()
    }
    names, norms = batch.files[f"{mask}.grad_names"], batch.files[f"{mask}.grad_norms"]
    theirs = dict(zip(map(hub_key, names.tolist()), norms, strict=True))
    assert ours.keys() == theirs.keys()
    wrong = {key: (ours[key], theirs[key]) for key in ours if abs(ours[key] / theirs[key] - 1) > GRADIENTS}
    assert not wrong


@pytest.mark.parametrize(("family", "side"), list(itertools.product(FAMILIES, SIDES)))
def test_image_decoder(golden_batch, golden_params, family, side):
    batch, params = golden_batch(family, side), golden_params(family)
    files, inputs = batch.files, batch.inputs("bidir")
    decoder = init_decoder(batch.config, params, seed=0)
    decoder["proj"] = {"kernel": files["mae_proj_weight"].T, "bias": files["mae_proj_bias"]}
    graph, _ = decoder_graph(batch.config)
    assert isinstance(bind(graph, decoder), ImageDecoder)
    hidden = forward(batch.config)(params, inputs)["hidden"][-1]
    rows, units = (part[files["mae_unit_mask"]] for part in batch.unit_of_image_token)
    chosen = np.zeros((len(batch.real), inputs.patches.shape[1] // 4), bool)
    chosen[rows, units] = True
    column = np.zeros(chosen.shape, np.int32)
    column[batch.unit_of_image_token] = np.nonzero(files["input_ids"] == batch.config.image_token)[1]

    @jax.jit
    def draw(params, hidden, inputs):
        head = bind(graph, params)
        return head(hidden, inputs.positions, inputs.spans, column), picture_loss(head, hidden, inputs, chosen)

    drawn, loss = draw(decoder, hidden, inputs)
    want = files["mae_pred"].reshape(len(rows), -1)
    np.testing.assert_allclose(drawn[rows, units], want, atol=LOSS)
    np.testing.assert_array_equal(
        inputs.patches.reshape(*chosen.shape, -1)[rows, units], files["mae_target"].reshape(len(rows), -1)
    )
    assert abs(loss - files["mae_loss"]) <= LOSS


@functools.cache
def embedding(config):
    graph, _ = graph_of(config)
    return jax.jit(lambda params, batch: embed_examples(bind(graph, params), batch))


@pytest.mark.parametrize(("family", "side", "mask"), CASES)
def test_embeddings_at_the_bridge(golden_batch, golden_params, family, side, mask):
    batch = golden_batch(family, side)
    spans, at = batch.spans(mask), np.argmax(batch.files["segment_ids"] == 2, axis=1)
    more = {"token_start": spans.start, "token_end": spans.end, "example": np.arange(3, dtype=np.int32)}
    more["pool"] = at[:, None, None].astype(np.int32)
    got = embedding(batch.config)(golden_params(family), {**batch.batch, **more})
    np.testing.assert_allclose(got, batch.files[f"{mask}.emb_bridge"], atol=LOSS)


@pytest.mark.parametrize(
    "compute", [Compute(remat="full"), Compute(dtype="bfloat16"), Compute(attention="blockwise")], ids=str
)
def test_other_ways_to_compute(golden_batch, golden_params, compute):
    batch = golden_batch("qwen2_5", "left")
    graph, _ = graph_of(batch.config, compute)
    got = jax.jit(functools.partial(run, graph))(golden_params("qwen2_5"), batch.inputs("bridged"))
    # bfloat16 keeps 8 bits of mantissa, and errors add up over the layers.
    limit = STATES if compute.dtype == "float32" else 0.05
    found = differences(batch, {name: np.float32(value) for name, value in got.items()}, "bridged")
    assert max(found.values()) <= limit, found
    assert got["hidden"].dtype == compute.dtype and got["logits"].dtype == np.float32


def linear_products(jaxpr):
    """Matrix products without a batch dimension in a program and all that it calls."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            count += equation.params["dimension_numbers"][1] == ((), ())
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(part, "jaxpr", part)
            count += linear_products(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_kept_products_are_not_made_again_and_change_no_gradient(golden_batch, golden_params, attention):
    batch, params = golden_batch("qwen2", "left"), golden_params("qwen2")
    inputs = (params, batch.inputs("bridged"), *batch.wanted_text())
    steps = {
        name: text_loss(batch.config, Compute(remat=name, attention=attention)) for name in ("none", "products", "full")
    }
    made = {name: linear_products(jax.make_jaxpr(step)(*inputs).jaxpr) for name, step in steps.items()}
    assert made["none"] == made["products"] < made["full"], made
    if attention == "reference":
        loss, kept = steps["products"](*inputs)
        assert abs(loss - batch.files["bridged.mntp_loss"]) <= LOSS
        # The same formulas on the same numbers, in programs that may be fused in other ways.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, kept, text_loss(batch.config)(*inputs)[1])


def test_an_unknown_remat_policy_is_refused(golden_batch, golden_params):
    batch = golden_batch("qwen2", "left")
    graph, _ = graph_of(batch.config, Compute(remat="some"))
    with pytest.raises(ValueError, match=r"'some' does not exist.*'full', 'none'"):
        bind(graph, golden_params("qwen2"))(batch.inputs("causal"))


# ---------------------------------------------------------------------- what the tolerances above would not let pass

VISIBLE = 50 * STATES  # a mutation stands out of the tolerance by far


@pytest.mark.parametrize("family", FAMILIES)
class TestMutations:
    """Each wrong model is seen: were it not, the parity above would prove little."""

    def after(self, golden_batch, golden_params, family, mask="bidir", config=None, tag="", used=None, **changes):
        batch = golden_batch(family, "left")
        got = forward(config or batch.config, tag)(golden_params(family), batch.inputs(used or mask, **changes))
        return batch, got, differences(batch, got, mask)

    def test_causal_for_bidirectional(self, golden_batch, golden_params, family):
        _, _, found = self.after(golden_batch, golden_params, family, used="causal")
        assert found["hidden1"] > VISIBLE and found["logits"] > VISIBLE

    def test_final_norm_dropped(self, golden_batch, golden_params, family):
        batch, got, _ = self.after(golden_batch, golden_params, family)
        assert error(got["without_norm"][batch.real], batch.files["bidir.hidden"][-1][batch.real]) > VISIBLE

    def test_rope_sections_swapped(self, golden_batch, golden_params, family):
        config = golden_batch(family, "left").config
        assert config.text.mrope_sections == (2, 3, 3)
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, mrope_sections=(3, 2, 3)))
        _, _, found = self.after(golden_batch, golden_params, family, config=config)
        assert found["hidden1"] > VISIBLE and found["vision_merged"] <= STATES

    def test_height_and_width_swapped(self, golden_batch, golden_params, family):
        positions = golden_batch(family, "left").batch["positions"][..., [0, 2, 1]]
        _, _, found = self.after(golden_batch, golden_params, family, positions=positions)
        assert found["hidden1"] > VISIBLE

    def test_patches_of_one_image_shifted_by_one(self, golden_batch, golden_params, family):
        patches = golden_batch(family, "left").batch["patches"].copy()
        patches[1, :32] = np.roll(patches[1, :32], 1, axis=0)
        _, _, found = self.after(golden_batch, golden_params, family, patches=patches)
        assert found["vision_merged"] > VISIBLE and found["hidden0"] > VISIBLE

    def test_reading_order_or_exact_gelu(self, golden_batch, golden_params, family, monkeypatch):
        if family == "qwen2":
            call = lambda self, x: self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))  # noqa: E731
            monkeypatch.setattr(layers.QuickMLP, "__call__", call)
            _, _, found = self.after(golden_batch, golden_params, family, tag="exact GELU")
            assert found["vision_last_hidden"] > VISIBLE
        else:
            unit = golden_batch(family, "left").batch["unit"]
            order = np.cumsum(unit >= 0, axis=1, dtype=np.int32) - 1
            _, _, found = self.after(golden_batch, golden_params, family, unit=np.where(unit >= 0, order, -1))
            assert found["hidden0"] > VISIBLE and found["vision_merged"] <= STATES

    def test_quick_gelu_in_the_merger(self, golden_batch, golden_params, family, monkeypatch):
        quick = lambda x, approximate: x * jax.nn.sigmoid(1.702 * x)  # noqa: E731
        monkeypatch.setattr(vision.jax.nn, "gelu", quick)
        _, _, found = self.after(golden_batch, golden_params, family, tag="quick GELU")
        assert found["vision_merged"] > VISIBLE and found["vision_last_hidden"] <= STATES

    def test_windows_forgotten(self, golden_batch, golden_params, family):
        batch = golden_batch(family, "left").batch
        if family == "qwen2":
            assert "window_start" not in batch
            return
        whole = {"window_start": batch["patch_start"], "window_end": batch["patch_end"]}
        _, _, found = self.after(golden_batch, golden_params, family, **whole)
        assert found["vision_last_hidden"] > VISIBLE
