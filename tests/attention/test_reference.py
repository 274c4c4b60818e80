"""The dense attention against a plain softmax in float64, and what the one door refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoa_jax.attention.api import IMPLEMENTATIONS, attend
from cocoa_jax.attention.spans import Spans

SCALE = 0.3


def case(B=2, T=5, S=9, N=6, K=2, H=4, seed=0):
    """Random q, k, v and spans; the first query of row 0 and the last two of row 1 see nothing."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    start = rng.integers(0, S - 1, (B, T)).astype(np.int32)
    end = (start + rng.integers(1, S, (B, T))).clip(max=S).astype(np.int32)
    start[0, 0] = end[0, 0] = 0
    start[1, -2:], end[1, -2:] = 5, (5, 3)  # empty, and less than empty
    return q, k, v, Spans(start, end)


def plain(q, k, v, spans):
    """One query, one head at a time, in float64."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = slice(spans.start[b, t], max(spans.end[b, t], spans.start[b, t]))
        keys, values = (np.float64(x[b, seen, n // group]) for x in (k, v))
        if len(keys):
            weights = np.exp(keys @ np.float64(q[b, t, n]) * SCALE)
            out[b, t, n] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("sizes", [{}, {"K": 6}, {"K": 1, "T": 9}, {"T": 9, "S": 5}], ids=str)
def test_against_a_softmax_in_float64(sizes):
    q, k, v, spans = case(**sizes) if sizes.get("S") != 5 else case(T=9, S=5)
    got = attend(q, k, v, spans, scale=SCALE)
    np.testing.assert_allclose(got, plain(q, k, v, spans), atol=2e-6)  # a few ulps of sums of S numbers near 1


def test_a_query_that_sees_nothing_gives_zeros_and_passes_no_gradient():
    q, k, v, spans = case()
    empty = spans.end <= spans.start
    assert empty.sum() == 3
    got = np.asarray(attend(q, k, v, spans, scale=SCALE))
    assert (got[empty] == 0).all() and (got[~empty] != 0).any(-1).all()
    weigh = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    def total(q, k, v, chosen):
        return jnp.sum(attend(q, k, v, spans, scale=SCALE) * weigh * chosen[..., None, None])

    all_gradients = jax.grad(total, (0, 1, 2))(q, k, v, np.ones_like(empty))
    assert all(np.isfinite(g).all() for g in all_gradients)
    assert (np.asarray(all_gradients[0])[empty] == 0).all()
    for gradient in jax.grad(total, (0, 1, 2))(q, k, v, empty):
        assert (np.asarray(gradient) == 0).all()


def test_keys_outside_the_span_do_not_matter():
    q, k, v, spans = case(T=4, S=8)
    spans = Spans(np.full_like(spans.start, 2), np.full_like(spans.end, 6))
    outside = np.r_[0:2, 6:8]
    other_k, other_v = k.copy(), v.copy()
    other_k[:, outside], other_v[:, outside] = 1e4, -1e4
    np.testing.assert_array_equal(attend(q, k, v, spans, scale=SCALE), attend(q, other_k, other_v, spans, scale=SCALE))


def test_half_precision_in_half_precision_out():
    q, k, v, spans = case()
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    got = attend(*low, spans, scale=SCALE)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), plain(*map(np.float32, low), spans), atol=0.03)  # 8 bits of mantissa


def test_what_lies_beyond_the_keys_is_not_seen():
    q, k, v = (x[:1] for x in case(T=6, S=4)[:3])
    beyond = Spans(np.int32([[-3, 4, -9, 6, -2, 3]]), np.int32([[-1, 9, 0, 7, 2, 8]]))
    got = np.asarray(attend(q, k, v, beyond, scale=SCALE))
    assert (got[0, :4] == 0).all()
    inside = Spans(np.int32([[0, 0, 0, 0, 0, 3]]), np.int32([[0, 0, 0, 0, 2, 4]]))
    np.testing.assert_array_equal(got, attend(q, k, v, inside, scale=SCALE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 9, 2, 5)}, "do not fit"),
        ({"v": (2, 8, 2, 4)}, "do not fit"),
        ({"k": (1, 9, 2, 4), "v": (1, 9, 2, 4)}, "do not fit"),
        ({"k": (2, 9, 4, 4), "v": (2, 9, 4, 4)}, "6 query heads are no multiple of 4"),
        ({"start": (2, 9)}, r"spans.start has shape \(2, 9\), expected \(2, 5\)"),
        ({"end": (5,)}, r"spans.end has shape \(5,\), expected \(2, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (2, 5, 6, 4), "k": (2, 9, 2, 4), "v": (2, 9, 2, 4), "start": (2, 5), "end": (2, 5)} | change
    q, k, v, start, end = (np.zeros(shape, np.float32) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, Spans(start, end), scale=SCALE)


def test_an_unknown_implementation_is_refused_by_name():
    q, k, v, spans = case()
    with pytest.raises(ValueError, match=r"'quick' does not exist.*'reference'"):
        attend(q, k, v, spans, scale=SCALE, implementation="quick")
    assert "reference" in IMPLEMENTATIONS
