"""Packing examples into rows of fixed shape: a pure function of their lengths."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

TOKENS, PATCHES, MASKED = 0, 1, 2
"""Columns of the lengths of examples, [n, 3]: tokens, patches and hidden tokens."""


class PackingError(ValueError):
    """An example that fits no row, or row settings that contradict each other."""


class Shape(NamedTuple):
    """B rows of T token slots and P patch slots each."""

    rows: int
    tokens: int
    patches: int


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """The shapes that a batch may have; each costs one compilation.

    Args:
        batch_size: records of the global batch.
        shapes: (global rows, tokens T, patches P), from cheap to dear; a batch gets the first that holds it. One of
            them has the largest T and the largest P: any example that fits a row at all fits one of its rows.
        examples_per_row: E, at most so many examples share a row.
        masked_per_row: M, at most so many tokens of a row are hidden.
        window: in stages 1 and 2, how many batches are planned together, from ``window * batch_size`` records whose
            lengths are stored: the more there are to choose from, the fuller the rows.
    """

    batch_size: int
    shapes: tuple[tuple[int, int, int], ...]
    examples_per_row: int
    masked_per_row: int
    window: int = 1

    def __post_init__(self) -> None:
        if min(self.batch_size, self.examples_per_row, self.masked_per_row, self.window) < 1:
            raise PackingError(f"{self}: batch_size, examples_per_row, masked_per_row and window start at 1: raise it")
        if not self.shapes or any(b < 1 or t < 1 or p < 0 for b, t, p in self.shapes):
            raise PackingError(f"shapes is {self.shapes}: give [rows, tokens, patches] each, rows and tokens from 1")
        for before, after in itertools.combinations(self.shapes, 2):
            cost, less = _slots(before), _slots(after)
            if before == after or (cost != less and less[0] <= cost[0] and less[1] <= cost[1]):
                raise PackingError(
                    f"shapes has {after} behind {before}, which has no fewer slots: list the cheap first"
                )
        longest = max(t for _, t, _ in self.shapes), max(p for _, _, p in self.shapes)
        if longest != self.widest[1:]:
            raise PackingError(
                f"shapes {self.shapes}: none has both {longest[0]} tokens and {longest[1]} patches, so an example may "
                "fit a row and a batch with it no shape: add one"
            )

    @property
    def widest(self) -> Shape:
        """The shape whose rows hold whatever a row of any shape holds."""
        return Shape(*max(self.shapes, key=lambda shape: (shape[1], shape[2], shape[0])))

    @property
    def step(self) -> int:
        """What the number of rows of every batch is a multiple of."""
        return math.gcd(*(rows for rows, _, _ in self.shapes))

    def divisible_by(self, parts: int) -> RowsConfig:
        """The same with every number of rows rounded up to a multiple of ``parts``."""
        return self._with_rows(lambda rows: -(-rows // parts) * parts)

    def at_most(self, limit: int) -> RowsConfig:
        """The same with no more than ``limit`` rows in any shape."""
        return self._with_rows(lambda rows: min(rows, limit))

    def _with_rows(self, of: Callable[[int], int]) -> RowsConfig:
        shapes = {(of(rows), tokens, patches) for rows, tokens, patches in self.shapes}
        return dataclasses.replace(self, shapes=tuple(sorted(shapes, key=_slots)))

    def check_shared(self, parts: int, by: str) -> None:
        """Refuse shapes whose rows cannot be divided evenly, such as by ``parts`` "devices".

        Raises:
            PackingError: naming the shape.
        """
        for shape in self.shapes:
            if shape[0] % parts:
                raise PackingError(
                    f"the {shape[0]} rows of {shape} cannot be shared by {parts} {by}: change data.rows.shapes"
                )


def _slots(shape: tuple[int, int, int]) -> tuple[int, int]:
    rows, tokens, patches = shape
    return rows * tokens, rows * patches


def check_fits(tokens: int, patches: int, config: RowsConfig, name: str) -> None:
    """Refuse an example that no row can hold.

    Raises:
        PackingError: naming the example, its length, the limit and the remedy.
    """
    widest = config.widest
    for what, length, limit in (("tokens", tokens, widest.tokens), ("patches", patches, widest.patches)):
        if length > limit:
            raise PackingError(f"{name}: {length} {what}, a row holds {limit}: lower max_pixels or widen rows.shapes")


def plan_rows(lengths: Int[np.ndarray, "n 3"], capacity: Sequence[int], examples: int) -> list[list[int]]:
    """First-fit decreasing: each example, longest first, goes into the first row with room for it.

    Args:
        lengths: of each example, see ``TOKENS``.
        capacity: of a row, in the same order.
        examples: how many examples a row holds at most.
    Returns:
        The example indices of each row; every example is in exactly one.
    Raises:
        PackingError: an example is longer than a row.
    """
    n, room = len(lengths), np.asarray(capacity, np.int64)
    for what, column, limit in zip(("tokens", "patches", "hidden tokens"), lengths.T, capacity, strict=True):
        if n and column.max() > limit:
            raise PackingError(
                f"example {int(column.argmax())}: {int(column.max())} {what}, a row holds {limit}: "
                "lower max_pixels or widen rows.shapes"
            )
    size = (lengths / np.maximum(room, 1)).max(axis=1)
    need = np.concatenate([lengths.astype(np.int64), np.ones((n, 1), np.int64)], axis=1)
    free = np.tile([*room, examples], (n, 1))
    rows: list[list[int]] = []
    for i in np.argsort(-size, kind="stable"):
        # A row that is not open yet always fits, so the first fit exists.
        row = int(np.argmax((free[: len(rows) + 1] >= need[i]).all(axis=1)))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(i))
        free[row] -= need[i]
    return rows


def plan_batch(lengths: Int[np.ndarray, "n 3"], config: RowsConfig) -> tuple[Shape, list[list[int]]]:
    """The first of the config's shapes into which the examples of a window pack, and the rows that hold any.

    The rows are those of all batches of the window: batch b of w gets rows b, b + w, b + 2 w and so on.

    Examples that overflow every shape get more rows of the widest, the next multiple of ``config.step``. That costs a
    compilation, but a run of days must not die of one unlucky batch; the pipeline counts these batches
    (``extra_rows``), and the remedy for many is a larger shape.

    Raises:
        PackingError: an example is longer than a row.
    """
    total, longest = lengths.sum(axis=0), lengths.max(axis=0, initial=0)
    for shape in map(Shape._make, config.shapes):
        capacity = (shape.tokens, shape.patches, config.masked_per_row)
        if (longest > capacity).any() or (total > np.multiply(capacity, shape.rows * config.window)).any():
            continue
        rows = plan_rows(lengths, capacity, config.examples_per_row)
        if len(rows) <= shape.rows * config.window:
            return shape, rows
    widest = config.widest
    rows = plan_rows(lengths, (widest.tokens, widest.patches, config.masked_per_row), config.examples_per_row)
    needed = -(-len(rows) // config.window)
    return widest._replace(rows=-(-needed // config.step) * config.step), rows


@dataclasses.dataclass(frozen=True)
class RowShare:
    """Which rows of a batch a process builds: some of equal blocks of them, in ascending order.

    Args:
        blocks: the numbers of its own.
        total: how many blocks there are.
    """

    blocks: tuple[int, ...] = (0,)
    total: int = 1

    @property
    def count(self) -> int:
        """How many processes, or groups of them that hold the same rows, share a batch."""
        return self.total // len(self.blocks)

    def of(self, rows: int) -> list[int]:
        """Those of the global rows.

        Raises:
            PackingError: the rows cannot be divided evenly.
        """
        if self.count == 1:
            return list(range(rows))
        if rows % self.total:
            raise PackingError(f"{rows} rows cannot be shared by {self.total} devices: change data.rows.shapes")
        size = rows // self.total
        return [block * size + row for block in self.blocks for row in range(size)]


ALONE = RowShare()
