"""Precision@1 and hit@k by cosine, in numpy, from embeddings of unit length."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

TIE = 1e-7  # cosines closer than this are equal: float32 resolves 6e-8 near 1
UNIT_TOLERANCE = 1e-3
CHUNK = 2**21  # cosines held at once (16 MiB)


@dataclass(frozen=True)
class Score:
    """What a task's embeddings reach; rates are in [0, 1].

    `p_at_1` and `hit_at_10` count a tie between right and wrong as wrong; `ties` is how many queries have such a tie at
    the top; `argmax_p_at_1` gives them the benefit of the doubt, as argmax does where the right candidate is listed
    first; `chance` is the p_at_1 of guessing.
    """

    p_at_1: float
    hit_at_10: float
    ties: int
    chance: float
    queries: int
    candidates: int
    argmax_p_at_1: float


class EmbeddingError(ValueError):
    """Embeddings that cannot be scored."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where the right candidates of every query stand.

    `above` counts the wrong candidates that are nearer than the best right one, `level` those that are nearer or tie;
    `right` and `wrong` are the cosines of the best right and the best wrong one, the latter NaN where there is none.
    """

    above: Int[np.ndarray, " Q"]
    level: Int[np.ndarray, " Q"]
    right: Float[np.ndarray, " Q"]
    wrong: Float[np.ndarray, " Q"]

    @property
    def tied(self) -> Bool[np.ndarray, " Q"]:
        """Queries at whose top a right and a wrong candidate tie."""
        return (self.above == 0) & (self.level > 0)


def rank(
    queries: Float[np.ndarray, "Q D"],
    candidates: Float[np.ndarray, "C D"],
    relevant: Sequence[AbstractSet[int]],
    lists: Sequence[Int[np.ndarray, " n"]] | None = None,
    tokens: int = 1,
    left_out: Int[np.ndarray, " Q"] | None = None,
) -> Ranks:
    """Compares the right candidates of every query with its wrong ones, by cosine.

    Candidates must be distinct contents; `relevant[q]` holds the indices of those right for query q, at least one;
    `lists[q]` names those that are compared at all (one named twice counts once), None all; `left_out[q]` one that is
    not, where it is not right, -1 none. `tokens`: see `similarities`. Memory: CHUNK cosines.

    Raises:
        EmbeddingError: rows that are not finite or not of unit length, or widths that differ.
        ValueError: `relevant` or `lists` do not fit the queries and candidates.
    """
    queries, candidates = _checked(queries, candidates)
    count, total = len(candidates), len(queries)
    _check_indices(total, count, relevant, lists)
    if left_out is not None and len(left_out) != total:
        raise ValueError(f"{len(left_out)} candidates to leave out for {total} queries: give one a query, -1 for none")
    above, level = np.zeros(total, np.int64), np.zeros(total, np.int64)
    best, rival = np.zeros(total), np.zeros(total)
    for start, cosines in _chunks(queries, candidates, tokens):
        right, wrong = np.zeros(cosines.shape, bool), np.full(cosines.shape, lists is None)
        for row in range(len(cosines)):
            if lists is not None:
                wrong[row, lists[start + row]] = True
            right[row, list(relevant[start + row])] = True
        if left_out is not None:
            some = np.flatnonzero(left_out[start : start + len(cosines)] >= 0)
            wrong[some, left_out[start + some]] = False
        wrong &= ~right
        nearest_right = np.where(right, cosines, -np.inf).max(axis=1, keepdims=True)
        rows = slice(start, start + len(cosines))
        above[rows] = (wrong & (cosines > nearest_right + TIE)).sum(axis=1)
        level[rows] = (wrong & (cosines >= nearest_right - TIE)).sum(axis=1)
        best[rows] = nearest_right[:, 0]
        rival[rows] = np.where(wrong, cosines, -np.inf).max(axis=1)
    return Ranks(above, level, best, np.where(np.isfinite(rival), rival, np.nan))


def score(
    queries: Float[np.ndarray, "Q D"],
    candidates: Float[np.ndarray, "C D"],
    relevant: Sequence[AbstractSet[int]],
    tokens: int = 1,
) -> Score:
    """Ranks all candidates for every query; see `rank`."""
    ranks = rank(queries, candidates, relevant, tokens=tokens)
    total, count = len(queries), len(candidates)
    first, tied = int((ranks.level == 0).sum()), int(ranks.tied.sum())
    return Score(
        p_at_1=first / total,
        hit_at_10=int((ranks.level < 10).sum()) / total,
        ties=tied,
        chance=sum(len(right) for right in relevant) / (count * total),
        queries=total,
        candidates=count,
        argmax_p_at_1=(first + tied) / total,
    )


def nearest(
    queries: Float[np.ndarray, "Q D"], candidates: Float[np.ndarray, "C D"], k: int, tokens: int = 1
) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """The k nearest candidates of every query and their cosines, nearest first; ties by the lower index.

    Raises:
        EmbeddingError: as `score`.
        ValueError: k is not in 1 .. C.
    """
    queries, candidates = _checked(queries, candidates)
    if not 1 <= k <= len(candidates):
        raise ValueError(f"k is {k}, there are {len(candidates)} candidates: choose k from 1 to that")
    indices = np.empty((len(queries), k), np.int64)
    cosines = np.empty((len(queries), k), np.float64)
    for start, block in _chunks(queries, candidates, tokens):
        order = np.argsort(-block, axis=1, kind="stable")[:, :k]
        indices[start : start + len(block)] = order
        cosines[start : start + len(block)] = np.take_along_axis(block, order, axis=1)
    return indices, cosines


def _check_indices(
    total: int, count: int, relevant: Sequence[AbstractSet[int]], lists: Sequence[Int[np.ndarray, " n"]] | None
) -> None:
    for what, given in (("sets of right candidates", relevant), ("lists of candidates", lists)):
        if given is not None and len(given) != total:
            raise ValueError(f"{len(given)} {what} for {total} queries: give one a query")
    for index, right in enumerate(relevant):
        if not right or min(right) < 0 or max(right) >= count:
            raise ValueError(
                f"right candidates of query {index} are {sorted(right)}: give at least one, each below {count}"
            )
    for index, listed in enumerate(lists or ()):
        if len(listed) and not 0 <= listed.min() <= listed.max() < count:
            raise ValueError(f"candidates of query {index} go from {listed.min()} to {listed.max()}, not below {count}")


def _checked(
    queries: Float[np.ndarray, "Q D"], candidates: Float[np.ndarray, "C D"]
) -> tuple[Float[np.ndarray, "Q D"], Float[np.ndarray, "C D"]]:
    wide = []
    for name, rows in (("queries", queries), ("candidates", candidates)):
        if rows.ndim != 2 or not len(rows):
            raise EmbeddingError(f"{name} have shape {rows.shape}: give at least one row, as [rows, width]")
        rows = rows.astype(np.float64)
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        if bad:
            raise EmbeddingError(
                f"{bad} of {len(rows)} {name} are not finite: the model diverged (see metrics.jsonl of its stage; "
                "train it at a lower learning rate) or its weights are broken (convert or fetch them again)"
            )
        length = np.linalg.norm(rows, axis=1)
        bad = int((np.abs(length - 1) > UNIT_TOLERANCE).sum())
        if bad:
            raise EmbeddingError(
                f"{bad} of {len(rows)} {name} are not of unit length (from {length.min():.4g} to {length.max():.4g}, "
                f"allowed 1 +- {UNIT_TOLERANCE}): normalise them"
            )
        wide.append(rows / length[:, None])
    if wide[0].shape[1] != wide[1].shape[1]:
        raise EmbeddingError(
            f"queries have width {wide[0].shape[1]}, candidates {wide[1].shape[1]}: embed both with one model"
        )
    return wide[0], wide[1]


def _chunks(
    queries: Float[np.ndarray, "Q D"], candidates: Float[np.ndarray, "C D"], tokens: int
) -> Iterator[tuple[int, Float[np.ndarray, "q C"]]]:
    rows = max(1, CHUNK // len(candidates))
    for start in range(0, len(queries), rows):
        yield start, similarities(queries[start : start + rows], candidates, tokens)


def similarities(
    queries: Float[np.ndarray, "q D"], candidates: Float[np.ndarray, "C D"], tokens: int
) -> Float[np.ndarray, "q C"]:
    """Cosines of rows of unit length; of several tokens, the mean over the query's of the nearest of the candidate's.

    Memory: three times what it returns, whatever the number of tokens.
    """
    if tokens == 1:
        return queries @ candidates.T
    asked, shown = (np.split(rows, tokens, axis=1) for rows in (queries, candidates))
    total = np.zeros((len(queries), len(candidates)))
    for one in asked:
        best = one @ shown[0].T
        for other in shown[1:]:
            np.maximum(best, one @ other.T, out=best)
        total += best
    return total
