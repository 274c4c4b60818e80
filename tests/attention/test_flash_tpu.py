"""The TPU kernels, run step by step on the CPU against the dense attention, and compiled for TPUs that are not here."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoa_jax.attention import flash_tpu, flash_tpu_blocks, flash_tpu_tiles, reference
from cocoa_jax.attention.api import attend
from cocoa_jax.attention.flash_tpu_blocks import HEADS, Tuning, fit, heads_per_tile
from cocoa_jax.attention.flash_tpu_tiles import Words, active_tiles, keys_per_call, masked, queries_per_call, unmasked
from cocoa_jax.attention.spans import Spans, causal, segments, truncated
from cocoa_jax.attention.tiles import FIRST, LAST, Blocks

TILE = Blocks(128, 128)  # the smallest that the units can take: a short row has several
SIZES = Tuning(TILE, TILE, 6)
FORWARD, BACKWARD = 5e-6, 1e-5  # float32: sums of a few hundred numbers near 1, in another order than the oracle's
SCALE = 0.1
EXAMPLES = settings(max_examples=8, deadline=None)  # each walks every tile of a row in the interpreter


def arrays(B, T, S, N, K, H, dtype=np.float32, seed=0):
    """q, k, v and the weights that make a number of the output."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@functools.cache
def program(kernel, sizes=SIZES):
    """Output and gradients of ``sum(output * weigh)``, jitted: compiled once per shape."""

    def attend(q, k, v, spans):
        if kernel:
            return flash_tpu.attend(q, k, v, spans, SCALE, sizes=sizes, interpret=True)
        return reference.attend(q, k, v, spans, SCALE)

    def run(q, k, v, weigh, spans):
        out, pull = jax.vjp(lambda *args: attend(*args, spans), q, k, v)
        return out, pull(weigh)

    return jax.jit(run)


def both(operands, spans, sizes=SIZES):
    """Output and gradients of the kernels and of the oracle, float32."""
    spans = Spans(*(jnp.asarray(a, jnp.int32) for a in (spans.start, spans.end)))
    runs = program(True, sizes)(*operands, spans), program(False)(*operands, spans)
    return jax.tree.map(np.float32, runs)


def assert_same(operands, spans, sizes=SIZES):
    """Kernels and oracle agree; queries that see nothing give zeros and get zero gradients."""
    (out, gradients), (want, wanted) = both(operands, spans, sizes)
    np.testing.assert_allclose(out, want, atol=FORWARD, rtol=FORWARD)
    for got, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, expected, atol=BACKWARD, rtol=BACKWARD)
    empty = spans.end <= spans.start
    assert not out[empty].any() and not gradients[0][empty].any()


def kernels(jaxpr):
    """The kernel calls in a program, those in programs inside it included."""
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "pallas_call":
            found += [call for inner in jaxprs_in_params(eqn.params) for call in kernels(inner)]
    return found


@st.composite
def any_spans(draw, B, T, S):
    """Rows of intervals in no order, long and short, empty, and reaching beyond the keys."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.sampled_from([1, 8, S // 2, 2 * S]))
    start = rng.integers(0, S, (B, T))
    end = start + rng.integers(-width // 2, width + 1, (B, T))
    start[0, : T // 2] = end[0, : T // 2] = 0  # at least one block of queries sees nothing
    return Spans(np.int32(start), np.int32(end))


@st.composite
def documents(draw, total):
    """One packed row: causal, truncated or whole documents, the rest padding."""
    lengths = draw(st.lists(st.integers(2, total // 2), min_size=1, max_size=4))
    while sum(lengths) > total:
        lengths.pop()
    segment = segments(lengths, total)
    kind = draw(st.sampled_from(["whole", "causal", "strict", "truncated"]))
    at = (segment.start + segment.end) // 2
    bridge = Spans(at, np.minimum(at + draw(st.integers(1, 3)), segment.end))
    spans = {"whole": lambda: segment, "causal": lambda: causal(segment)}.get(
        kind, lambda: truncated(segment, bridge, kind == "strict")
    )()
    return Spans(spans.start[None], spans.end[None])


@EXAMPLES
@given(any_spans(2, 200, 300))
def test_any_spans_with_tails_and_shared_keys(spans):
    assert_same(arrays(2, 200, 300, 4, 2, 64), spans)


@EXAMPLES
@given(documents(384))
def test_packed_documents_of_the_vision_towers_width(spans):
    assert_same(arrays(1, 384, 384, 2, 2, 80), spans)


def test_query_heads_in_several_groups_add_their_gradients():
    spans = Spans(np.full((1, 128), 10, np.int32), np.full((1, 128), 250, np.int32))
    sizes = SIZES._replace(heads=2)
    assert heads_per_tile(4, sizes.heads) == 2
    # All query heads of a key head at once in the 2B and the 7B, half of them in the 3B.
    assert [heads_per_tile(shared, HEADS) for shared in (6, 7, 8)] == [6, 7, 4]
    assert_same(arrays(1, 128, 256, 4, 1, 128), spans, sizes)


def test_bfloat16_is_as_good_as_dense_bfloat16():
    operands = arrays(1, 256, 256, 2, 1, 128, jnp.bfloat16)
    segment = segments([200, 40], 256)
    spans = Spans(segment.start[None], segment.end[None])
    runs = both(operands, spans)
    exact = jax.tree.map(np.float32, program(False)(*(x.astype(jnp.float32) for x in operands), spans))
    for got, dense, want in zip(*map(jax.tree.leaves, (*runs, exact)), strict=True):
        ours, theirs = (np.sqrt(np.mean((a - want) ** 2)) for a in (got, dense))
        assert ours <= 1.05 * theirs  # both round their products once; 5 % for the luck of the rounding


def test_a_new_axis_under_vmap_joins_the_rows():
    q, k, v, weigh = arrays(4, 128, 128, 2, 1, 64)
    segment = segments([70, 50], 128)
    spans = Spans(*(jnp.tile(a, (4, 1)) for a in (segment.start, segment.end)))

    def total(q, k, v, spans, weigh):
        out = flash_tpu.attend(q, k, v, spans, SCALE, sizes=SIZES, interpret=True)
        return jnp.sum(out * weigh), out

    gradient = jax.grad(total, (0, 1, 2), has_aux=True)
    pairs = [a.reshape(2, 2, *a.shape[1:]) for a in (q, k, v, weigh)]
    shared = Spans(spans.start[:2], spans.end[:2])  # not mapped: every member has the same spans
    mapped = jax.jit(jax.vmap(gradient, (0, 0, 0, None, 0)))
    got, out = mapped(*pairs[:3], shared, pairs[3])
    want, expected = jax.jit(gradient)(q, k, v, spans, weigh)
    for a, b in zip((*got, out), (*want, expected), strict=True):
        np.testing.assert_array_equal(np.reshape(a, b.shape), b)
    calls = kernels(jax.make_jaxpr(mapped)(*pairs[:3], shared, pairs[3]).jaxpr)
    assert [call.outvars[0].aval.shape[0] for call in calls] == [4, 4]  # not a loop over calls of two rows


def test_long_rows_in_parts(monkeypatch):
    monkeypatch.setattr(flash_tpu_tiles, "WORDS", 4)  # the forward pass takes two blocks of queries at a time
    monkeypatch.setitem(flash_tpu_blocks.DEVICES, jax.devices()[0].device_kind, flash_tpu_blocks.Device(2**20, 128))
    assert queries_per_call(1, 300, 200, TILE) == 256 and keys_per_call(1, 300, 200, TILE, 128) == 128
    program.cache_clear()
    spans = Spans(np.arange(300, dtype=np.int32)[None] // 2, np.full((1, 300), 200, np.int32))
    operands = arrays(1, 300, 200, 2, 2, 64)
    calls = kernels(jax.make_jaxpr(program(True))(*operands, spans).jaxpr)
    assert len(calls) == 2 + 2  # forward by queries, backward by keys
    assert_same(operands, spans)
    program.cache_clear()


def test_remat_that_keeps_the_named_values_runs_the_forward_kernel_once():
    q, k, v, _ = arrays(1, 128, 128, 1, 1, 64)
    segment = segments([128], 128)
    spans = Spans(segment.start[None], segment.end[None])

    def total(q):
        return jnp.sum(flash_tpu.attend(2 * q, k, v, spans, SCALE, sizes=SIZES, interpret=True))

    def runs(policy):
        traced = jax.make_jaxpr(jax.grad(jax.checkpoint(total, policy=policy)))(q)
        return len(kernels(traced.jaxpr))

    assert runs(None) == 3  # forward, forward again, backward
    assert runs(jax.checkpoint_policies.save_only_these_names(flash_tpu.OUT, flash_tpu.LSE)) == 2


@given(any_spans(2, 300, 500))
def test_the_list_holds_every_tile_that_somebody_sees(spans):
    words = Words(2, *TILE.grid(300, 500))
    tiles, count = active_tiles(spans, 500, TILE, words)
    listed = np.asarray(tiles)[: int(count)]
    dense = np.zeros((2, 3 * 128, 4 * 128), bool)
    dense[:, :300, :500] = spans.as_mask(500)
    dense = dense.reshape(2, 3, 128, 4, 128)
    places = [
        tuple(map(int, place)) for place in zip(words.row(listed), words.query(listed), words.key(listed), strict=True)
    ]
    computed = {place for place, word in zip(places, listed, strict=True) if masked(word) or unmasked(word)}
    assert set(zip(*map(np.ndarray.tolist, dense.any((2, 4)).nonzero()), strict=True)) <= computed
    assert {place for place, word in zip(places, listed, strict=True) if unmasked(word)} <= set(
        zip(*map(np.ndarray.tolist, dense.all((2, 4)).nonzero()), strict=True)
    )
    assert places == sorted(places) and len(set(places)) == len(places)
    for flag in (FIRST, LAST):  # every block of queries is begun and written once, seen or not
        assert sorted(p[:2] for p, word in zip(places, listed, strict=True) if word & flag) == [
            (b, i) for b in range(2) for i in range(3)
        ]
    assert not (np.asarray(tiles)[int(count) :] & 15).any()


def test_words_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="raise the block size"):
        Words(4096, 1024, 1024)


def test_blocks_are_no_longer_than_the_row():
    assert fit(Blocks(512, 256), 200, 1000) == (256, 256)


# No device is opened: ask no metadata server, and let other processes compile at the same time.
COMPILING = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_tpus_over_rows_and_heads(chip, monkeypatch):
    for key, value in COMPILING.items():
        monkeypatch.setitem(os.environ, key, value)
    described = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    mesh = Mesh(np.array(described.devices[:4]).reshape(2, 2), ("fsdp", "tensor"))
    place = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    q, k = (jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16, sharding=place) for n in (4, 2))
    bound = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=rows)

    def total(q, k, v, start, end):
        out = attend(q, k, v, Spans(start, end), scale=SCALE, implementation="flash_tpu")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(q, k, k, bound, bound).compile()
    text = compiled.as_text()
    assert "span_attention_forward" in text and "span_attention_backward" in text
    assert "all-gather" not in text  # every device works on its own rows and heads
