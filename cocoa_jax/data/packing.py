"""Packing examples into rows of fixed shape: a pure function of their lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


class PackingError(ValueError):
    """An example that fits no row, or row settings that contradict each other."""


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """Shapes of a batch.

    Args:
        batch_size: records of the global batch.
        tokens: T, token slots of a row.
        patches: P, patch slots of a row; 0 for text alone.
        rows: the ascending numbers of global rows that a batch may have; one compilation each.
        examples_per_row: E, at most so many examples share a row.
        masked_per_row: M, at most so many tokens of a row are hidden.
    """

    batch_size: int
    tokens: int
    patches: int
    rows: tuple[int, ...]
    examples_per_row: int
    masked_per_row: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.tokens < 1 or self.patches < 0 or self.examples_per_row < 1:
            raise PackingError(f"{self}: batch_size, tokens and examples_per_row start at 1, patches at 0: raise it")
        if not self.rows or min(self.rows) < 1 or list(self.rows) != sorted(set(self.rows)):
            raise PackingError(f"rows is {self.rows}: give ascending numbers of rows, such as [16, 32]")
        if self.masked_per_row < self.examples_per_row:
            raise PackingError(
                f"masked_per_row is {self.masked_per_row}, every one of {self.examples_per_row} examples_per_row "
                "needs one: raise it"
            )


def check_fits(tokens: int, patches: int, config: RowsConfig, name: str) -> None:
    """Refuse an example that no row can hold.

    Raises:
        PackingError: naming the example, its length, the limit and the remedy.
    """
    for what, length, limit in (("tokens", tokens, config.tokens), ("patches", patches, config.patches)):
        if length > limit:
            raise PackingError(f"{name}: {length} {what}, a row holds {limit}: lower max_pixels or raise rows.{what}")


def plan_rows(
    token_lengths: Sequence[int], patch_lengths: Sequence[int], tokens: int, patches: int, examples: int
) -> list[list[int]]:
    """First-fit decreasing: each example, longest first, goes into the first row with room for it.

    Args:
        token_lengths, patch_lengths: of each example.
        tokens, patches, examples: capacities T, P, E of a row.
    Returns:
        The example indices of each row; every example is in exactly one.
    Raises:
        PackingError: an example is longer than a row.
    """
    t, p = np.asarray(token_lengths, np.int64), np.asarray(patch_lengths, np.int64)
    for what, lengths, limit in (("tokens", t, tokens), ("patches", p, patches)):
        if len(lengths) and lengths.max() > limit:
            raise PackingError(
                f"example {int(lengths.argmax())}: {int(lengths.max())} {what}, a row holds {limit}: "
                f"lower max_pixels or raise rows.{what}"
            )
    size = np.maximum(t / max(tokens, 1), p / max(patches, 1))
    free = np.tile(np.array([tokens, patches, examples], np.int64), (len(t), 1))
    rows: list[list[int]] = []
    for i in np.argsort(-size, kind="stable"):
        need = np.array([t[i], p[i], 1])
        # A row that is not open yet always fits, so the first fit exists.
        row = int(np.argmax((free[: len(rows) + 1] >= need).all(axis=1)))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(i))
        free[row] -= need
    return rows


def choose_rows(needed: int, buckets: Sequence[int]) -> int:
    """How many rows a batch gets: the smallest bucket that holds ``needed``.

    A batch that overflows the largest bucket gets the next multiple of the buckets' common divisor. That costs a
    compilation, but a run of days must not die of one unlucky batch; the pipeline counts these batches
    (``extra_rows``), and the remedy for many is a larger bucket.
    """
    for bucket in buckets:
        if needed <= bucket:
            return bucket
    step = math.gcd(*buckets)
    return -(-needed // step) * step


def share(rows: int, process_index: int, process_count: int) -> slice:
    """The consecutive global rows that belong to one process.

    Raises:
        PackingError: the rows cannot be divided evenly.
    """
    if not 0 <= process_index < process_count:
        raise PackingError(f"process_index is {process_index} of {process_count} processes: count from 0")
    if rows % process_count:
        raise PackingError(f"{rows} rows cannot be shared by {process_count} processes: make rows.rows multiples of it")
    part = rows // process_count
    return slice(process_index * part, (process_index + 1) * part)
