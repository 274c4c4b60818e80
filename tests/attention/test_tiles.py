"""Hulls and tile lists against the dense mask, on random spans, rows and blocks of any size."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.attention.spans import Spans, segments
from cocoa_jax.attention.tiles import (
    COMPUTE,
    FIRST,
    LAST,
    MASK,
    Blocks,
    count_tiles,
    key_hulls,
    query_hulls,
    tile_bound,
    tile_list,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Spans, int, Blocks]:
    """Spans [2, T], S and blocks; half of the spans move on with the queries, as the method's do."""
    T, S = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    start = rng.integers(0, S, (2, T)).astype(np.int32)
    end = (start + rng.integers(-3, draw(st.integers(1, S + 3)), (2, T))).astype(np.int32)
    if draw(st.booleans()):
        start, end = np.sort(start), np.sort(end)
    return Spans(start, end), S, Blocks(draw(st.integers(1, 20)), draw(st.integers(1, 20)))


def dense(spans: Spans, keys: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Which tiles [2, Q, J] hold anything visible, and which nothing else; slots outside are hidden."""
    T = spans.start.shape[1]
    Q, J = blocks.grid(T, keys)
    mask = np.zeros((2, Q * blocks.query, J * blocks.key), bool)
    mask[:, :T, :keys] = spans.as_mask(keys)
    tiles = mask.reshape(2, Q, blocks.query, J, blocks.key)
    return tiles.any((2, 4)), tiles.all((2, 4))


def inside(lo: np.ndarray, hi: np.ndarray, count: int) -> np.ndarray:
    return (lo[..., None] <= np.arange(count)) & (np.arange(count) < hi[..., None])


def tight(lo: np.ndarray, hi: np.ndarray, seen: np.ndarray) -> None:
    """The smallest run that holds all that is seen; 0, 0 where nothing is."""
    for low, high, row in zip(lo.ravel(), hi.ravel(), seen.reshape(-1, seen.shape[-1]), strict=True):
        where = np.flatnonzero(row)
        assert (low, high) == ((where[0], where[-1] + 1) if len(where) else (0, 0))


@given(cases())
def test_hulls_are_tight_and_full_tiles_exact(case):
    spans, keys, blocks = case
    seen, full = dense(*case)
    hulls = query_hulls(spans, keys, blocks)
    tight(hulls.lo, hulls.hi, seen)
    np.testing.assert_array_equal(hulls.full(np.arange(seen.shape[2])[None, None]), full)
    visited = inside(hulls.lo, hulls.hi, seen.shape[2])
    assert (full <= visited).all()
    tight(*key_hulls(hulls, seen.shape[2]), visited.swapaxes(1, 2))
    assert count_tiles(*case) == (seen.size, visited.sum(), visited.sum() - full.sum())


@given(cases(), st.sampled_from(["query", "key"]))
def test_the_list_holds_every_visited_tile_once_and_in_order(case, outer):
    spans, keys, blocks = case
    seen, full = dense(*case)
    hulls = query_hulls(spans, keys, blocks)
    bound = 2 * tile_bound(spans.start.shape[1], keys, blocks)
    tiles = tile_list(hulls, seen.shape[2], outer, bound)
    n = int(tiles.count)
    at = np.stack([tiles.row, tiles.query, tiles.key], 1)[:n]
    flags = tiles.flags[:n]
    assert (tiles.flags[n:] == 0).all() and len(tiles.flags) == bound
    listed = np.zeros_like(seen)
    listed[tuple(at[flags & COMPUTE > 0].T)] = True
    assert listed.sum() == (flags & COMPUTE > 0).sum() and (listed >= seen).all()  # none twice
    np.testing.assert_array_equal(flags & MASK > 0, (flags & COMPUTE > 0) & ~full[tuple(at.T)])
    block = at[:, [0, 1 if outer == "query" else 2]]
    assert len(np.unique(block, axis=0)) == 2 * seen.shape[1 if outer == "query" else 2]  # every block is written
    changes = (block[1:] != block[:-1]).any(1)
    np.testing.assert_array_equal(flags & FIRST > 0, np.r_[True, changes])
    np.testing.assert_array_equal(flags & LAST > 0, np.r_[changes, True])


@pytest.mark.parametrize("outer", ["query", "key"])
def test_the_same_under_jit(outer):
    segment = segments([11, 5, 9], 30)
    spans, blocks = Spans(segment.start[None], segment.end[None]), Blocks(4, 8)

    def listed(spans):
        return tile_list(query_hulls(spans, 30, blocks), 4, outer, 32)

    for got, want in zip(jax.tree.leaves(jax.jit(listed)(spans)), jax.tree.leaves(listed(spans)), strict=True):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 40), st.integers(1, 40))
def test_the_bound_of_short_segments_holds(lengths, query, key):
    segment, blocks = segments(lengths, 180), Blocks(query, key)
    hulls = query_hulls(Spans(segment.start[None], segment.end[None]), 180, blocks)
    for outer in ("query", "key"):
        bound = tile_bound(180, 180, blocks, longest=9)
        assert tile_list(hulls, blocks.grid(180, 180)[1], outer, bound).count <= bound


def test_counts_of_four_packed_documents():
    segment = segments([1100, 700, 1300, 996], 4096)
    assert count_tiles(Spans(segment.start[None], segment.end[None]), 4096, Blocks(256, 256)) == (256, 90, 45)
