"""The active tiles of a call as one word each: what the grid of the TPU kernels walks, kept in scalar memory."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from cocoa_jax.attention.spans import Spans
from cocoa_jax.attention.tiles import COMPUTE, FIRST, LAST, MASK, Blocks, query_hulls, tile_list

FLAG_BITS = 4  # FIRST, LAST, COMPUTE, MASK
WORDS = 32768  # most entries of one call: 128 KiB of the 1 MiB of scalar memory


@dataclasses.dataclass(frozen=True)
class Words:
    """How row, query block, key block and flags share an int32; works on Python, jax and kernel scalars alike.

    Args:
        rows: B.
        queries: number of query blocks.
        keys: number of key blocks.
    """

    rows: int
    queries: int
    keys: int

    def __post_init__(self) -> None:
        if self._row_shift + (self.rows - 1).bit_length() > 31:
            raise ValueError(
                f"{self.rows} rows of {self.queries} x {self.keys} tiles do not fit into one word: raise the block size"
            )

    @property
    def _query_shift(self) -> int:
        return FLAG_BITS + (self.keys - 1).bit_length()

    @property
    def _row_shift(self) -> int:
        return self._query_shift + (self.queries - 1).bit_length()

    @property
    def bound(self) -> int:
        """The most tiles that can be active, whatever the spans."""
        return self.rows * self.queries * self.keys

    def pack(self, row: Array, query: Array, key: Array, flags: Array) -> Array:
        """One word."""
        return row << self._row_shift | query << self._query_shift | key << FLAG_BITS | flags

    def row(self, word: Array) -> Array:
        """The row of the batch."""
        return word >> self._row_shift

    def query(self, word: Array) -> Array:
        """The block of queries."""
        return (word >> self._query_shift) & ((1 << self._row_shift - self._query_shift) - 1)

    def key(self, word: Array) -> Array:
        """The block of keys."""
        return (word >> FLAG_BITS) & ((1 << self._query_shift - FLAG_BITS) - 1)

    def begins_row(self, word: Array) -> Array:
        """Whether this is the first tile of a row of the batch."""
        return (self.query(word) == 0) & (word & FIRST != 0)

    def ends_row(self, word: Array) -> Array:
        """Whether this is the last tile of a row of the batch."""
        return (self.query(word) == self.queries - 1) & (word & LAST != 0)


def masked(word: Array) -> Array:
    """Whether somebody sees a part of the tile only."""
    return word & MASK != 0


def unmasked(word: Array) -> Array:
    """Whether everybody sees the whole tile."""
    return word & (COMPUTE | MASK) == COMPUTE


def active_tiles(spans: Spans, keys: int, blocks: Blocks, words: Words) -> tuple[Int[Array, " W"], Int[Array, ""]]:
    """The words of the active tiles in the order of the queries, and how many there are.

    Entries past the count repeat the last tile without flags, so that a longer grid does nothing there.
    """
    hulls = query_hulls(spans, keys, blocks)
    tiles = tile_list(hulls, words.keys, "query", words.bound)
    return words.pack(tiles.row, tiles.query, tiles.key, tiles.flags), tiles.count


def queries_per_call(rows: int, queries: int, keys: int, blocks: Blocks) -> int:
    """How many queries one forward call takes, so that its list stays below ``WORDS``; more than there are for all."""
    return blocks.query * max(WORDS // (rows * blocks.grid(queries, keys)[1]), 1)


def keys_per_call(rows: int, queries: int, keys: int, blocks: Blocks, resident: int) -> int:
    """How many keys one backward call takes: their gradients stay in vector memory, at most ``resident`` of them."""
    most = WORDS // (rows * blocks.grid(queries, keys)[0])
    return blocks.key * max(min(most, resident // blocks.key), 1)


def stacked(spans: Spans) -> Int[Array, "B 2 T"]:
    """Start and end of each query as two rows: one operand instead of two."""
    return jnp.stack([spans.start, spans.end], axis=1).astype(jnp.int32)
