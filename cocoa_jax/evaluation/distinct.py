"""The distinct contents of a set: what shows the same is one content, however often and wherever it is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from cocoa_jax.data.readers.ranked import LazyContents, RankedSet
from cocoa_jax.data.sources import Content

Tick = Callable[[int], object]


@dataclass(frozen=True, eq=False)
class Distinct:
    """A set in terms of its distinct contents.

    Args:
        contents: every distinct content of queries and candidates, made when asked for.
        digests: a hash of each, 16 bytes in hex.
        queries: of each query, its content.
        candidates: the contents that are candidates.
        lists, right, left_out: as those of the set, in places among ``candidates``; what is left out stays a candidate
            where another stored one shows the same.
        repeated: how many stored candidates show what an earlier one shows.
        repeated_right: how many entries of lists, the right ones apart, show what the right candidate shows.
    """

    contents: Sequence[Content]
    digests: tuple[str, ...]
    queries: Int32[np.ndarray, " Q"]
    candidates: Int32[np.ndarray, " C"]
    lists: tuple[Int32[np.ndarray, " n"], ...] | None
    right: tuple[frozenset[int], ...]
    repeated: int
    repeated_right: int
    left_out: Int32[np.ndarray, " Q"] | None = None

    def listed(self, query: int) -> Int[np.ndarray, " n"]:
        """The places of the distinct candidates that a query is compared with."""
        listed = np.arange(len(self.candidates)) if self.lists is None else np.unique(self.lists[query])
        return listed if self.left_out is None else listed[listed != self.left_out[query]]

    @property
    def counts(self) -> Int[np.ndarray, " n"]:
        """How many distinct candidates queries are compared with; one number where it is the same for all."""
        if self.lists is not None:
            return np.array([len(self.listed(query)) for query in range(len(self.queries))])
        return len(self.candidates) - (np.zeros(1, int) if self.left_out is None else self.left_out >= 0)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over all contents, pictures too, and what belongs to what."""
        digest = hashlib.blake2b("".join(self.digests).encode(), digest_size=8)
        left_out = () if self.left_out is None else (self.left_out,)
        for part in (self.queries, self.candidates, *(self.lists or ()), *left_out):
            digest.update(part.astype(np.int32).tobytes())
        digest.update(repr([sorted(places) for places in self.right]).encode())
        return digest.hexdigest()


def content_digest(content: Content) -> str:
    """Equal for contents of which a model is shown the same: the words and the bytes of the pictures."""
    digest = hashlib.blake2b(content.text.encode("utf-8", "surrogatepass"), digest_size=16)
    for image in content.images:
        digest.update(b"\0" + len(image.data).to_bytes(8, "little") + bytes([image.mirrored]) + image.data)
    return digest.hexdigest()


def distinct(ranked: RankedSet, tick: Tick | None = None) -> Distinct:
    """Reads every stored content once, to see which show the same.

    Args:
        tick: told how many contents were read.

    Raises:
        SourceError: naming a content that cannot be read.
    """
    place: dict[str, int] = {}
    first: list[tuple[Sequence[Content], int]] = []

    def number(side: Sequence[Content]) -> Int32[np.ndarray, " n"]:
        numbers = np.empty(len(side), np.int32)
        for i in range(len(side)):
            digest = content_digest(side[i])
            if digest not in place:
                place[digest] = len(place)
                first.append((side, i))
            numbers[i] = place[digest]
            if tick is not None:
                tick(1)
        return numbers

    queries, stored = number(ranked.queries), number(ranked.candidates)
    candidates, among = np.unique(stored, return_inverse=True)
    among = among.astype(np.int32)
    lists = None if ranked.lists is None else tuple(among[listed] for listed in ranked.lists)
    right = tuple(frozenset(int(among[i]) for i in places) for places in ranked.right)
    copies = [
        int(np.isin(listed, list(places)).sum()) - len(kept)
        for listed, places, kept in zip(lists or (), right, ranked.right, strict=False)
    ]
    return Distinct(
        contents=LazyContents(first, lambda at: at[0][at[1]]),
        digests=tuple(place),
        queries=queries,
        candidates=candidates.astype(np.int32),
        lists=lists,
        right=right,
        repeated=len(stored) - len(candidates),
        repeated_right=sum(copies),
        left_out=None if ranked.left_out is None else _alone(ranked.left_out, among),
    )


def _alone(stored: Int32[np.ndarray, " Q"], among: Int32[np.ndarray, " C"]) -> Int32[np.ndarray, " Q"]:
    places = np.where(stored < 0, -1, among[stored])
    return np.where(np.bincount(among)[places] == 1, places, -1).astype(np.int32)
