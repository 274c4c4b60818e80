"""Spans against the definitions of the method, slot by slot."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.attention.spans import Spans, bidirectional, causal, segments, truncated

TOTAL = 48  # slots of every row: JAX compiles once per shape
LENGTHS = st.lists(st.integers(1, 9), max_size=5)


def on_jax(spans: Spans) -> Spans:
    return Spans(jnp.asarray(spans.start), jnp.asarray(spans.end))


def assert_mask(spans: Spans, want: np.ndarray) -> None:
    total = want.shape[-1]
    np.testing.assert_array_equal(spans.as_mask(total), want)
    assert spans.start.dtype == spans.end.dtype == np.int32
    hidden = ~want.any(-1)  # who sees nothing carries (0, 0), so that a kernel may skip the block
    assert not np.asarray(spans.start)[hidden].any() and not np.asarray(spans.end)[hidden].any()


def owners(lengths: list[int], total: int) -> np.ndarray:
    """Which document each slot belongs to, -1 for padding."""
    return np.concatenate([np.repeat(np.arange(len(lengths)), lengths), np.full(total - sum(lengths), -1)])


@given(LENGTHS)
def test_segments_bidirectional_and_causal(lengths):
    owner, segment = owners(lengths, TOTAL), segments(lengths, TOTAL)
    same = (owner[:, None] == owner) & (owner >= 0)[:, None]
    before = np.arange(TOTAL)[:, None] >= np.arange(TOTAL)
    for place in (lambda spans: spans, on_jax):
        assert_mask(place(segment), same)
        assert_mask(bidirectional(place(segment)), same)
        assert_mask(causal(place(segment)), same & before)


@st.composite
def documents(draw):
    """Rows of documents, each A, K bridge tokens and B: lengths, and the block of each slot."""
    bridge = draw(st.integers(1, 3))
    sides = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
    block = np.array([*"".join("A" * a + "e" * bridge + "B" * b for a, b in sides).ljust(TOTAL, "-")])
    return [a + bridge + b for a, b in sides], block


def bridges(lengths: list[int], block: np.ndarray) -> Spans:
    """The bridge interval of each slot's document."""
    start, end, first = np.zeros(TOTAL, np.int32), np.zeros(TOTAL, np.int32), 0
    for length in lengths:
        inside = first + np.flatnonzero(block[first : first + length] == "e")
        start[first : first + length], end[first : first + length] = inside[0], inside[-1] + 1
        first += length
    start[first:], end[first:] = start[0], end[0]  # what stands at padding must not matter
    return Spans(start, end)


@given(documents(), st.booleans())
def test_truncated_is_what_the_method_says(document, strict):
    lengths, block = document
    owner, segment = owners(lengths, TOTAL), segments(lengths, TOTAL)
    sees = {"A": "Ae", "B": "eB", "e": "Ae" if strict else "AeB", "-": ""}
    want = np.array([np.isin(block, [*sees[name]]) for name in block]) & (owner[:, None] == owner)
    made = truncated(segment, bridges(lengths, block), strict)
    assert_mask(made, want)
    assert_mask(truncated(on_jax(segment), on_jax(bridges(lengths, block)), strict), want)


@given(documents(), st.booleans())
def test_block_b_hears_of_block_a_through_the_bridge_alone(document, strict):
    lengths, block = document
    mask = truncated(segments(lengths, TOTAL), bridges(lengths, block), strict).as_mask(TOTAL)
    in_a, in_b = block == "A", block == "B"
    assert not mask[np.ix_(in_b, in_a)].any() and not mask[np.ix_(in_a, in_b)].any()
    # Over any number of layers: cut the bridge's own view of A, and nothing of A reaches B any more.
    cut = mask & ~((block == "e")[:, None] & in_a)
    reach = np.linalg.matrix_power(cut.astype(np.int64) + np.eye(TOTAL, dtype=np.int64), 4) > 0
    assert not reach[np.ix_(in_b, in_a)].any()
    whole = np.linalg.matrix_power(mask.astype(np.int64) + np.eye(TOTAL, dtype=np.int64), 2) > 0
    owner = owners(lengths, TOTAL)
    together = owner[:, None] == owner
    assert whole[np.ix_(in_b, in_a)][together[np.ix_(in_b, in_a)]].all()
    # Strict: nothing of B reaches A or the bridge, so no token helps to rebuild itself.
    if strict:
        every = np.linalg.matrix_power(mask.astype(np.int64) + np.eye(TOTAL, dtype=np.int64), 4) > 0
        assert not every[np.ix_(~in_b, in_b)].any()


def test_rows_are_batched_on_leading_axes():
    rows = [segments([3, 2], 6), segments([1], 6)]
    stacked = Spans(np.stack([row.start for row in rows]), np.stack([row.end for row in rows]))
    for b, row in enumerate(rows):
        np.testing.assert_array_equal(causal(stacked).as_mask(6)[b], causal(row).as_mask(6))


def test_segments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"9 tokens do not fit into 8 slots"):
        segments([4, 5], 8)
