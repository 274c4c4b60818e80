"""One contract for every implementation: the dense reference, on spans of every kind.

Few shapes and many spans, so that little is compiled. An implementation joins by one line in ``IMPLEMENTATIONS``.
"""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_jax.attention import blockwise, flash_tpu, reference
from cocoa_jax.attention.spans import Spans, bidirectional, causal, segments, truncated
from cocoa_jax.attention.tiles import Blocks

SCALE = 0.35
# Blocks far smaller than the rows, and none that divides them: many tiles of every kind at little cost.
IMPLEMENTATIONS = {
    "reference": reference.attend,
    "blockwise": functools.partial(blockwise.attend, cut=blockwise.Cut(Blocks(16, 8), 1, 2)),
    "flash_tpu": functools.partial(flash_tpu.attend, interpret=True),  # one tile here; test_flash_tpu has rows of many
}
each = pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS))
B, T, N, K, H = 2, 52, 4, 2, 8
# Sums of at most 52 numbers near 1 in another order: some ulps each, more where gradients add over queries and heads.
FORWARD, GRADIENT = 5e-6, 1e-5


@st.composite
def square_row(draw: st.DrawFn) -> Spans:
    """Spans [T] over T keys: packed segments of any length with padding anywhere, each row of one kind."""
    lengths = draw(st.lists(st.integers(0, T), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) <= T))
    segment = segments(lengths, T)
    kind = draw(st.sampled_from(["bidirectional", "causal", "bridge", "strict", "window"]))
    if kind == "causal":
        spans = causal(segment)
    elif kind in ("bridge", "strict"):
        length = segment.end - segment.start
        first = segment.start + (length * draw(st.floats(0, 1))).astype(np.int32)
        bridge = Spans(first, np.minimum(first + draw(st.integers(1, 9)), segment.end).astype(np.int32))
        spans = truncated(segment, bridge, strict=kind == "strict")
    elif kind == "window":
        width, index = draw(st.integers(1, 20)), np.arange(T, dtype=np.int32)
        spans = Spans(np.maximum(segment.start, index - width), np.minimum(segment.end, index + width))
    else:
        spans = bidirectional(segment)
    return _hidden(spans, draw(st.sets(st.integers(0, T - 1), max_size=8)))


@st.composite
def any_row(draw: st.DrawFn, keys: int) -> Spans:
    """Spans [T] over other keys, without any order: each query its own interval, some of them empty or less.

    Some rows reach beyond the keys on either side, and some of their intervals lie there as a whole.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    far = draw(st.sampled_from([0, 3, keys]))
    start = rng.integers(-far, keys + far, T).astype(np.int32)
    end = np.minimum(start + rng.integers(-2, draw(st.integers(1, keys)) + 1, T), keys + far).astype(np.int32)
    return _hidden(Spans(start, end), draw(st.sets(st.integers(0, T - 1), max_size=8)))


def _hidden(spans: Spans, padding: set[int]) -> Spans:
    start, end = spans.start.copy(), spans.end.copy()
    start[list(padding)] = end[list(padding)] = 0
    return Spans(start, end)


def _stack(rows: list[Spans]) -> Spans:
    return Spans(np.stack([row.start for row in rows]), np.stack([row.end for row in rows]))


@functools.cache
def _arrays(keys: int, dtype: str = "float32", key_heads: int = K) -> tuple[jax.Array, ...]:
    """Queries, keys, values, and weights of the output in the loss."""
    rng = np.random.default_rng(keys)
    shapes = [(B, T, N, H), (B, keys, key_heads, H), (B, keys, key_heads, H), (B, T, N, H)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@functools.cache
def _jitted(name: str):
    """(q, k, v, weights, spans) -> output and its gradients."""

    def both(q, k, v, weights, spans):
        out, pull = jax.vjp(lambda *qkv: IMPLEMENTATIONS[name](*qkv, spans, SCALE), q, k, v)
        return out, pull(weights)

    return jax.jit(both)


def _same(name: str, spans: Spans, keys: int, key_heads: int = K) -> None:
    arrays = _arrays(keys, key_heads=key_heads)
    out, gradients = _jitted(name)(*arrays, spans)
    wanted, wanted_gradients = _jitted("reference")(*arrays, spans)
    np.testing.assert_allclose(out, wanted, atol=FORWARD, rtol=FORWARD)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=GRADIENT, rtol=GRADIENT)
    empty = ~spans.as_mask(keys).any(-1)
    assert (np.asarray(out)[empty] == 0).all() and (np.asarray(gradients[0])[empty] == 0).all()
    seen = spans.as_mask(keys).any(1)
    assert all((np.asarray(g)[~seen] == 0).all() for g in gradients[1:])


@each
@settings(max_examples=60)
@given(rows=st.lists(square_row(), min_size=B, max_size=B))
def test_spans_of_the_method(name, rows):
    _same(name, _stack(rows), T)


@each
@pytest.mark.parametrize("keys", [21, 75])
@settings(max_examples=20)
@given(data=st.data())
def test_any_spans_over_other_keys(name, keys, data):
    _same(name, _stack([data.draw(any_row(keys)) for _ in range(B)]), keys)


@each
@pytest.mark.parametrize("key_heads", [1, 4])
def test_one_key_head_for_all_queries_and_one_for_each(name, key_heads):
    _same(name, _stack([segments([30, 15], T), causal(segments([52], T))]), T, key_heads)


@each
def test_rows_that_see_nothing_at_all(name):
    nothing = np.zeros((B, T), np.int32)
    out, gradients = _jitted(name)(*_arrays(T), Spans(nothing, nothing))
    assert all((np.asarray(x) == 0).all() for x in (out, *gradients))


@each
def test_keys_that_nobody_sees_may_hold_anything(name):
    q, k, v, weights = _arrays(T)
    spans = _stack([segments([40], T)] * B)
    huge = [x.at[:, 40:].set(1e4) for x in (k, v)]
    for got, want in zip(
        jax.tree.leaves(_jitted(name)(q, *huge, weights, spans)),
        jax.tree.leaves(_jitted(name)(q, k, v, weights, spans)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@each
def test_large_scores_neither_overflow_nor_vanish(name):
    q, k, v, weights = _arrays(T)
    spans = _stack([causal(segments([52], T))] * B)
    got = _jitted(name)(q * 30, k * 30, v, weights, spans)  # scores of some thousands: the softmax picks one key
    want = _jitted("reference")(q * 30, k * 30, v, weights, spans)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    np.testing.assert_allclose(got[0], want[0], atol=2e-3)  # scores of 3000 carry an error of 2e-4 each


@each
@settings(max_examples=10)
@given(rows=st.lists(square_row(), min_size=B, max_size=B))
def test_half_precision_is_no_worse_than_dense_half_precision(name, rows):
    spans, low = _stack(rows), _arrays(T, "bfloat16")
    exact = _jitted("reference")(*(x.astype(jnp.float32) for x in low), spans)
    dense, got = _jitted("reference")(*low, spans), _jitted(name)(*low, spans)
    for truth, allowed, found in zip(*map(jax.tree.leaves, (exact, dense, got)), strict=True):
        assert found.dtype == jnp.bfloat16
        errors = [float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - truth) ** 2))) for x in (allowed, found)]
        assert errors[1] <= 1.1 * errors[0] + 1e-3  # both round at other places; an ulp of bfloat16 at 1 is 8e-3


@each
def test_a_mapped_axis_is_one_more_axis_of_rows(name):
    arrays, spans = _arrays(T), _stack([segments([30, 15], T), causal(segments([50], T))])
    alone = _jitted(name)(*arrays, spans)

    def one(q, k, v, weights, start, end):
        out, pull = jax.vjp(lambda *x: IMPLEMENTATIONS[name](*x, Spans(start[None], end[None]), SCALE), q, k, v)
        return out, pull(weights)

    by_row = [x[:, None] for x in arrays]
    mapped = jax.jit(jax.vmap(one))(*by_row, spans.start, spans.end)
    for got, want in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got[:, 0], want, atol=FORWARD, rtol=FORWARD)


def test_a_mapped_axis_of_queries_alone_repeats_the_rest():
    q, k, v, weights = _arrays(T)
    spans = _stack([segments([30, 15], T)] * B)
    several = jnp.stack([q, q + 1, q - 1])

    def loss(k, implementation):
        out = jax.vmap(lambda q: IMPLEMENTATIONS[implementation](q, k, v, spans, SCALE))(several)
        return jnp.sum(out * weights)

    got, want = (jax.jit(jax.grad(loss), static_argnums=1)(k, name) for name in ("blockwise", "reference"))
    np.testing.assert_allclose(got, want, atol=3 * GRADIENT, rtol=GRADIENT)  # a sum of three gradients


@pytest.mark.parametrize("length", [4096])
def test_memory_grows_with_the_length_and_not_with_its_square(length):
    """Deterministic: what XLA plans for forward and backward at T = 4096, six heads of 64, float32."""
    shape = jax.ShapeDtypeStruct((1, length, 6, 64), jnp.float32)
    ints = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def gradients(q, k, v, start, end):
        return jax.grad(lambda *x: jnp.sum(blockwise.attend(*x, Spans(start, end), 0.125)), (0, 1, 2))(q, k, v)

    planned = jax.jit(gradients).lower(shape, shape, shape, ints, ints).compile().memory_analysis()
    assert planned.temp_size_in_bytes <= 64 * 2**20  # one dense [6, 4096, 4096] is 384 MiB


def test_on_several_devices():
    """In a process of its own, which has eight virtual devices."""
    script = Path(__file__).parent / "many_devices.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
