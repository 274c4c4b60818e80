"""LoRA and DoRA by their formulas: what is adapted, where an adapter begins, its norm, its dropout, its merging."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import print_saved_residuals

from cocoa_jax.models import lora
from cocoa_jax.models.config import parse_config
from cocoa_jax.models.layers import PRODUCTS, Embedding, Linear
from cocoa_jax.models.lora import (
    AdapterRecord,
    LoraConfig,
    LoraError,
    adapted_graph,
    adapted_maps,
    column_norms,
    join,
    merge,
)
from cocoa_jax.models.low_rank import LowRank, TrainedRows, column_norm, dropped, hashed
from cocoa_jax.models.qwen2_vl import Compute, abstract_params

init_adapter = jax.jit(lora.init_adapter, static_argnums=(1, 2, 3))
# Float32 sums in another order, relative to the largest number.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def sizes_of(golden):
    return lambda family: parse_config(json.loads((golden / f"{family}.config.json").read_text()))


@pytest.fixture(scope="module")
def base(golden_params):
    return jax.tree.map(jnp.asarray, golden_params("qwen2"))


def close(got, want, tolerance=ROUNDING):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(np.abs(want).max()))


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- what is adapted


@pytest.mark.parametrize(
    ("family", "mlp"), [("qwen2", {"fc1", "fc2"}), ("qwen2_5", {"gate_proj", "up_proj", "down_proj"})]
)
def test_the_papers_maps_and_no_others(sizes_of, family, mlp):
    found = set(adapted_maps(abstract_params(sizes_of(family)), LoraConfig()))
    text = {f"text.layers.attention.{x}_proj" for x in "qkvo"} | {
        f"text.layers.mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    assert found == text | {"vision.layers.attention.qkv"} | {f"vision.layers.mlp.{x}" for x in mlp}


def test_shapes_are_those_of_the_stacked_maps(sizes_of):
    sizes = sizes_of("qwen2")
    _, shapes = adapted_graph(sizes, Compute(), LoraConfig(), (3, 5))
    found = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in flatten_dict(shapes, sep=".").items()}
    L, D = sizes.text.layers, sizes.text.width
    assert found["text.layers.mlp.up_proj.a"] == ((L, D, 8), "float32")
    assert found["text.layers.mlp.up_proj.b"] == ((L, 8, sizes.text.mlp_width), "float32")
    assert found["text.layers.mlp.up_proj.magnitude"] == ((L, sizes.text.mlp_width), "float32")
    assert found["text.embed.rows"] == ((2, D), "float32")
    plain = adapted_graph(sizes, Compute(), LoraConfig(dora=False), ())[1]
    assert not [path for path in flatten_dict(plain, sep=".") if path.endswith(("magnitude", "rows", "key"))]


def test_the_beginning(base):
    config, rows = LoraConfig(rank=4), (3, 5)
    adapter = init_adapter(base, config, rows, 1)
    leaves = flatten_dict(adapter, sep=".")
    a = np.concatenate([leaf.ravel() for path, leaf in leaves.items() if path.endswith(".a")])
    # 7 thousand numbers: the deviation is known to 0.8%, the mean to 1.2% of it.
    assert a.size > 7_000 and abs(a.std() * config.rank - 1) < 0.03 and abs(a.mean() * config.rank) < 0.04
    assert not any(leaf.any() for path, leaf in leaves.items() if path.endswith(".b"))
    kernel = base["text"]["layers"]["mlp"]["up_proj"]["kernel"]
    close(leaves["text.layers.mlp.up_proj.magnitude"], np.linalg.norm(kernel, axis=1))
    np.testing.assert_array_equal(leaves["text.embed.rows"], base["text"]["embed"]["table"][np.array(rows)])
    jax.tree.map(np.testing.assert_array_equal, adapter, init_adapter(base, config, rows, 1))
    # A map's numbers depend on its own path, not on which others are adapted; and on the seed.
    alone = init_adapter(base, LoraConfig(rank=4, targets=(r"text\.layers\.mlp\.up_proj",)), (), 1)
    np.testing.assert_array_equal(alone["text"]["layers"]["mlp"]["up_proj"]["a"], leaves["text.layers.mlp.up_proj.a"])
    assert (
        init_adapter(base, config, rows, 2)["text"]["layers"]["mlp"]["up_proj"]["a"]
        != alone["text"]["layers"]["mlp"]["up_proj"]["a"]
    ).all()


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"rank": 0}, ["rank is 0: at least 1"]),
        ({"rank": -1, "alpha": 0.0, "dropout": 1.0}, ["rank is -1", "alpha is 0.0", "dropout is 1.0"]),
        ({"targets": ("text(", "a"), "rank": 0}, ["'text('", "rank is 0"]),
        ({"targets": (), "tokens": False}, ["nothing is left to train"]),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_together(given_, words):
    with pytest.raises(LoraError) as caught:
        LoraConfig(**given_)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_targets_that_fit_nothing_and_maps_that_cannot_be_adapted_are_named_together(sizes_of):
    targets = (r"text\.layers\.attention\.query", r".*\.fc9", r"vision\.patch_embed", r"text\.layers\.mlp\.up_proj")
    with pytest.raises(LoraError) as caught:
        adapted_maps(abstract_params(sizes_of("qwen2")), LoraConfig(targets=targets))
    told = str(caught.value)
    assert repr(targets[0]) in told and repr(targets[1]) in told and "vision.patch_embed cannot be adapted" in told
    assert repr(targets[3]) not in told and "text.layers.attention.q_proj" in told  # what there is to choose from
    untied = dataclasses.replace(sizes_of("qwen2"), text=dataclasses.replace(sizes_of("qwen2").text, tied_head=False))
    with pytest.raises(LoraError, match=r"text\.head cannot be adapted: leave it out"):
        adapted_maps(abstract_params(untied), LoraConfig(targets=(r"text\.head",)))
    with pytest.raises(LoraError, match=r"row 160 is outside of the embedding of 160 rows"):
        adapted_graph(sizes_of("qwen2"), Compute(), LoraConfig(), (160,))


def test_a_record_survives_being_written_down():
    record = AdapterRecord(LoraConfig(rank=3, targets=("a.*",), dropout=0.0), (4, 2))
    assert AdapterRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


# ----------------------------------------------------------------------------------------------------------- the norm


norm_of = jax.jit(column_norm)


@settings(max_examples=40)
@given(st.sampled_from([(1, 5, 7, 2), (3, 9, 4, 1), (2, 1, 3, 4)]), st.floats(0.1, 16), st.integers(0, 99))
def test_the_norm_is_that_of_the_sum(shape, scale, seed):
    L, inputs, outputs, rank = shape
    kernel = random(seed, L, inputs, outputs)
    a, b = random(seed + 1, L, inputs, rank), random(seed + 2, L, rank, outputs)
    whole = kernel.astype(np.float64) + scale * (a.astype(np.float64) @ b)
    # Sums of products that may nearly cancel: the error is relative to the largest that they can be.
    size = (np.linalg.norm(kernel, axis=1) + scale * np.linalg.norm(np.abs(a) @ np.abs(b), axis=1)) ** 2
    got = np.asarray(norm_of(kernel, a, b, scale), np.float64)
    assert (np.abs(got**2 - np.linalg.norm(whole, axis=1) ** 2) <= 2e-5 * size).all()


def test_a_column_of_zeros_has_a_finite_gain():
    zero = np.zeros((4, 3), np.float32)
    norm = column_norm(zero, zero[:, :2], np.zeros((2, 3), np.float32), 1.0)
    assert (norm > 0).all() and (norm < 1e-10).all()


def test_the_norm_makes_no_update_of_the_size_of_the_weight():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((30, 50), (30, 4), (4, 50))]

    def products(norm):
        equations = jax.make_jaxpr(norm)(*shapes).eqns
        return [equation.outvars[0].aval.shape for equation in equations if equation.primitive.name == "dot_general"]

    # A^T W and (A^T A) B, and A^T A itself; what is left of the weight's size is its square, which is summed at once.
    assert sorted(map(np.prod, products(lambda w, a, b: column_norm(w, a, b, 2.0)))) == [4 * 4, 4 * 50, 4 * 50]
    assert products(lambda w, a, b: jnp.sum((w + 2.0 * (a @ b)) ** 2, axis=0)) == [(30, 50)]


# ------------------------------------------------------------------------------------------------- an adapted map


def adapted_map(rate=0.0, weight_too=True, dora=True, seed=0):
    """A map 6 -> 5 with a random adapter, and its arrays."""
    linear = Linear(6, 5, bias=True, rngs=nnx.Rngs(seed))
    linear.bias[...] = random(seed, 5)
    linear.adapter = LowRank((), 6, 5, rank=2, scale=3.0, dora=dora, rate=rate, weight_too=weight_too)
    linear.adapter.a[...], linear.adapter.b[...] = random(seed + 1, 6, 2), random(seed + 2, 2, 5)
    if dora:
        linear.adapter.magnitude[...] = np.abs(random(seed + 3, 5)) + 1
        set_norm(linear)
    return linear


def set_norm(linear):
    part = linear.adapter
    part.norm[...] = column_norm(linear.kernel[...], part.a[...], part.b[...], part.scale)


@pytest.mark.parametrize("dora", [False, True])
def test_a_map_by_the_formula_and_merged(dora):
    linear, x = adapted_map(dora=dora), random(9, 4, 7, 6)
    whole = np.asarray(linear.kernel[...] + 3.0 * (linear.adapter.a[...] @ linear.adapter.b[...]))
    if dora:
        whole = whole / np.linalg.norm(whole, axis=0) * linear.adapter.magnitude[...]
    close(linear(x), x @ whole + linear.bias[...])


def test_gradients_take_the_norm_for_a_constant():
    linear, x, y = adapted_map(), random(9, 11, 6), random(8, 11, 5)
    kernel, bias, norm = (
        linear.kernel[...],
        linear.bias[...],
        column_norm(linear.kernel[...], linear.adapter.a[...], linear.adapter.b[...], 3.0),
    )

    def by_formula(part):
        return jnp.sum((x @ ((kernel + 3.0 * part["a"] @ part["b"]) * (part["magnitude"] / norm)) + bias) * y)

    def by_module(part):
        graph, state = nnx.split(linear)
        tree = nnx.to_pure_dict(state)
        return jnp.sum(nnx.merge(graph, {**tree, "adapter": {**tree["adapter"], **part}})(x) * y)

    part = {name: getattr(linear.adapter, name)[...] for name in ("a", "b", "magnitude")}
    jax.tree.map(close, jax.grad(by_module)(part), jax.grad(by_formula)(part))


def test_a_small_gain_is_not_lost_in_bfloat16():
    linear = adapted_map()
    linear.bias[...] = jnp.zeros(5)
    linear.adapter.b[...] = jnp.zeros((2, 5))
    set_norm(linear)
    norm = linear.adapter.norm[...]
    x = jnp.asarray(random(9, 4000, 6), jnp.bfloat16)
    linear.adapter.magnitude[...] = norm
    before = np.asarray(linear(x), np.float64)
    linear.adapter.magnitude[...] = norm * 1.001  # an eighth of a step of bfloat16: few numbers move, each by a step
    after = np.asarray(linear(x), np.float64)
    # 20 thousand sums, each rounded to 1/512 of itself: their mean is known to 1e-5.
    assert abs((after * before).sum() / (before * before).sum() - 1.001) < 1e-4


@pytest.mark.parametrize("settings", [{"dora": False}, {}, {"rate": 0.3}, {"rate": 0.3, "weight_too": False}])
def test_what_the_policy_products_keeps_is_rounded(settings, capsys):
    graph, state = nnx.split(adapted_map(**settings))

    @functools.partial(jax.checkpoint, policy=PRODUCTS)
    def total(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) ** 2)

    print_saved_residuals(total, state, jnp.ones((7, 6), jnp.bfloat16))
    kept = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    # What comes out, and with DoRA what the gains are multiplied with; never the float32 sums.
    assert len(kept) == 1 + settings.get("dora", True) and all("bf16[7,5]" in line for line in kept), kept


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = jnp.full((200, 500), 2.0)
    got = np.asarray(dropped(x, np.array([3, 0x1234ABCD, 0, 1], np.uint32), 0.1))
    share = (got == 0).mean()
    # 100 thousand draws: a deviation of 0.001.
    assert abs(share - 0.1) < 0.004 and set(np.unique(got)) == {np.float32(0), np.float32(2 / 0.9)}


def test_random_bits_of_dropout_are_even_and_differ_by_words_and_place():
    words = np.array([[5, 0x1234ABCD], [5 + 1536, 0x9E3779B9], [5 + 9, 0x6A09E667], [2**31, 0xBB67AE85]], np.uint32)
    tables = np.stack([np.asarray(hashed(np.uint32([*pair, 0, 1]), 256, 1536)) for pair in words])
    drawn = (tables < 0.1 * 2**32) - 0.1
    # Deviations of a mean over n draws of a share of 0.1 are 0.3 / sqrt(n); 5.5 of them among some thousand means.
    assert np.abs(drawn.mean((1, 2))).max() < 5.5 * 0.3 / np.sqrt(drawn[0].size)
    assert np.abs(drawn.mean(1)).max() < 5.5 * 0.3 / np.sqrt(256)
    assert np.abs(drawn.mean(2)).max() < 5.5 * 0.3 / np.sqrt(1536)
    # Tables of two pairs of words, moved on by any number of places, and a table and itself, are as independent as true
    # draws: products deviate by 0.09 / sqrt(n).
    spectra = np.fft.rfft(drawn.reshape(4, -1))
    for i, j in [(0, 0), (0, 1), (1, 2), (2, 3)]:
        moved = np.fft.irfft(spectra[i] * spectra[j].conj())[i == j :] / drawn[0].size
        assert np.abs(moved).max() < 6.5 * 0.09 / np.sqrt(drawn[0].size), (i, j)
    bits = np.unpackbits(tables[0].view(np.uint8)).mean()
    assert abs(bits - 0.5) < 5 * 0.5 / np.sqrt(tables[0].size * 32)


def test_rows_drop_the_same_whatever_the_chunks():
    whole = np.asarray(hashed(np.uint32([5, 6, 0, 1]), 12, 7))
    chunks = [np.asarray(hashed(np.uint32([5, 6, number, 3]), 4, 7)) for number in range(3)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_places_are_counted_beyond_32_bits():
    """As when a plan asks for all rows of a large batch on one device."""
    words = jax.ShapeDtypeStruct((4,), jnp.uint32)
    bits = jax.eval_shape(lambda words: hashed(words, 512 * 1280, 8960), words)
    assert bits.shape == (512 * 1280, 8960)


@pytest.mark.parametrize("weight_too", [True, False])
def test_what_dropout_touches(weight_too):
    linear, x = adapted_map(rate=0.5, weight_too=weight_too), random(9, 40, 6)
    part, kernel = linear.adapter, linear.kernel[...]
    kept = np.asarray(dropped(x, part.words[...], 0.5))
    gain = part.magnitude[...] / column_norm(kernel, part.a[...], part.b[...], 3.0)
    update = 3.0 * kept @ part.a[...] @ part.b[...]
    seen = kept if weight_too else x
    close(linear(x), x @ kernel + (gain - 1) * (seen @ kernel) + gain * update + linear.bias[...])


@pytest.mark.parametrize(("mode", "weight_too"), [("peft", True), ("update", False)])
def test_the_settings_of_dropout_reach_every_map(base, sizes_of, mode, weight_too):
    config = LoraConfig(dora_dropout=mode, dropout=0.3)
    key = jax.random.key(0)
    for training in (True, False):
        graph, shapes = adapted_graph(sizes_of("qwen2"), Compute(), config, (), dropout=training)
        adapter = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        model = nnx.merge(
            graph, join(base, adapter, column_norms(base, adapter, config.scale), key if training else None)
        )
        parts = [part for _, part in nnx.iter_graph(model) if isinstance(part, LowRank)]
        assert len(parts) == 10 and {part.rate for part in parts} == {0.3 if training else 0.0}
        assert {part.weight_too for part in parts} == {weight_too}
        assert {part.words is not None for part in parts} == {training}


def test_every_map_and_layer_drops_for_itself(base):
    adapter = init_adapter(base, LoraConfig(), (3,), 0)
    norms = column_norms(base, adapter, 8.0)
    tree = flatten_dict(join(base, adapter, norms, jax.random.key(5), (2, 3)), sep=".")
    words = [np.asarray(leaf).reshape(-1, 4) for path, leaf in tree.items() if path.endswith(".words")]
    layers = sum(leaf.shape[0] for path, leaf in flatten_dict(adapter, sep=".").items() if path.endswith(".a"))
    drawn, cut = np.split(np.concatenate(words), 2, axis=1)
    assert len(drawn) == layers == len({tuple(pair) for pair in drawn.tolist()}) and (cut == [2, 3]).all()
    other = flatten_dict(join(base, adapter, norms, jax.random.key(6)), sep=".")
    assert all((other[path][..., :2] != tree[path][..., :2]).any() for path in tree if path.endswith(".words"))
    assert not [path for path in flatten_dict(join(base, adapter, norms), sep=".") if path.endswith(".words")]


# ---------------------------------------------------------------------------------------------------- rows, and merging


def test_rows_are_read_and_scored_as_if_they_stood_in_the_table():
    embed, rows, ids = Embedding(9, 4, rngs=nnx.Rngs(0)), random(1, 2, 4), np.array([[0, 7, 3], [3, 8, 7]])
    hidden = random(2, 2, 3, 4)
    table = np.asarray(embed.table[...]).copy()
    table[[7, 3]] = rows
    embed.adapter = TrainedRows((7, 3), 4)
    embed.adapter.rows[...] = rows
    np.testing.assert_array_equal(embed(ids, jnp.float32), table[ids])
    close(embed.score(hidden), hidden @ table.T)


def test_merging_keeps_types_and_all_that_is_not_adapted(base):
    config = LoraConfig(targets=(r"text\.layers\.mlp\.up_proj", r"vision\.merger\.fc1"), rank=2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, init_adapter(half, config, (3,), 0))
    whole = merge(half, adapter, config, (3,))
    old, new = flatten_dict(half, sep="."), flatten_dict(whole, sep=".")
    assert {leaf.dtype for leaf in new.values()} == {jnp.dtype("bfloat16")}
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {"text.layers.mlp.up_proj.kernel", "vision.merger.fc1.kernel", "text.embed.table"}
    np.testing.assert_array_equal(new["text.embed.table"][3], adapter["text"]["embed"]["rows"][0].astype(jnp.bfloat16))
    assert np.array_equal(np.delete(new["text.embed.table"], 3, 0), np.delete(old["text.embed.table"], 3, 0))


def test_merging_into_donated_weights_uses_up_only_what_changes(base):
    config = dataclasses.replace(LoraConfig(), targets=(r"text\.layers\.mlp\.up_proj",))
    mine = jax.tree.map(jnp.array, base)
    merge(mine, init_adapter(mine, config, (), 0), config, (), donate=True)
    assert [path for path, leaf in flatten_dict(mine, sep=".").items() if leaf.is_deleted()] == [
        "text.layers.mlp.up_proj.kernel"
    ]
