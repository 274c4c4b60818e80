"""The scorer against an oracle that sorts, and its refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_jax.evaluation import scorer
from cocoa_jax.evaluation.scorer import EmbeddingError, nearest, score


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def oracle(queries: np.ndarray, candidates: np.ndarray, relevant: list[set[int]], depth: int) -> float:
    """One query at a time: the wrong candidates first among equals, then look for a right one in the first `depth`."""
    hits = 0
    for query, right in zip(queries.astype(np.float64), relevant, strict=True):
        cosines = np.round(candidates.astype(np.float64) @ query, 6)
        ranked = sorted(range(len(candidates)), key=lambda c: (-cosines[c], c in right))
        hits += any(c in right for c in ranked[:depth])
    return hits / len(queries)


@st.composite
def tasks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[set[int]]]:
    """Few distinct directions, so that ties abound; all cosines are multiples of 1/2 or of sqrt(1/2) apart."""
    directions = unit(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [-1, 0, 0], [0, -1, 1]], float))
    rows = st.integers(0, len(directions) - 1)
    queries = draw(st.lists(rows, min_size=1, max_size=6))
    candidates = draw(st.lists(rows, min_size=1, max_size=25))
    right = st.sets(st.integers(0, len(candidates) - 1), min_size=1, max_size=3)
    return directions[queries], directions[candidates], [draw(right) for _ in queries]


@settings(max_examples=200, deadline=None)
@given(tasks(), st.integers(1, 60))
def test_score_is_the_oracles(task: tuple[np.ndarray, np.ndarray, list[set[int]]], chunk: int) -> None:
    queries, candidates, relevant = task
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "CHUNK", chunk)
        result = score(queries, candidates, relevant)
    assert result.p_at_1 == oracle(queries, candidates, relevant, 1)
    if len(candidates) >= 10:
        assert result.hit_at_10 == oracle(queries, candidates, relevant, 10)
    expected = np.mean([len(right) / len(candidates) for right in relevant])
    assert result.chance == pytest.approx(expected, abs=1e-12)  # the same sum in another order
    assert result.argmax_p_at_1 == pytest.approx(result.p_at_1 + result.ties / len(queries), abs=1e-12)
    assert (result.queries, result.candidates) == (len(queries), len(candidates))


def test_random_embeddings_score_as_the_oracle_says() -> None:
    rng = np.random.default_rng(0)
    queries, candidates = unit(rng.standard_normal((150, 8))), unit(rng.standard_normal((90, 8)))
    relevant = [set(rng.choice(90, 3, replace=False).tolist()) for _ in range(150)]
    result = score(queries, candidates, relevant)
    assert result.p_at_1 == oracle(queries, candidates, relevant, 1)
    assert result.hit_at_10 == oracle(queries, candidates, relevant, 10)
    assert result.ties == 0


def test_a_collapsed_model_scores_nothing() -> None:
    rows = unit(np.ones((30, 16)))
    result = score(rows, rows, [{i} for i in range(30)])
    assert (result.p_at_1, result.hit_at_10, result.ties) == (0, 0, 30)
    assert result.argmax_p_at_1 == 1  # what the usual rule would report


def test_two_right_candidates_may_tie() -> None:
    rows = unit(np.array([[1.0, 0], [1, 0], [0, 1]]))
    result = score(rows[:1], rows, [{0, 1}])
    assert (result.p_at_1, result.ties) == (1, 0)


def test_a_tie_below_the_top_is_no_tie() -> None:
    rows = unit(np.array([[1.0, 0], [1, 1], [1, 1]]))
    result = score(rows[:1], rows, [{1}])
    assert (result.p_at_1, result.ties, result.hit_at_10) == (0, 0, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_counted(value: float) -> None:
    rows = unit(np.eye(4))
    bad = rows.copy()
    bad[1:3, 0] = value
    with pytest.raises(EmbeddingError, match="2 of 4 queries are not finite"):
        score(bad, rows, [{0}] * 4)
    with pytest.raises(EmbeddingError, match="2 of 4 candidates are not finite"):
        nearest(rows, bad, 1)


def test_rows_must_have_unit_length() -> None:
    rows = unit(np.eye(3))
    with pytest.raises(EmbeddingError, match="1 of 3 candidates are not of unit length"):
        score(rows, rows * np.array([[1.0], [2], [1]]), [{0}] * 3)
    with pytest.raises(EmbeddingError, match="3 of 3 queries"):
        score(np.zeros((3, 3)), rows, [{0}] * 3)


def test_what_does_not_fit_is_refused() -> None:
    rows = unit(np.eye(3))
    with pytest.raises(ValueError, match="2 sets"):
        score(rows, rows, [{0}, {1}])
    with pytest.raises(ValueError, match="query 1"):
        score(rows, rows, [{0}, set(), {1}])
    with pytest.raises(ValueError, match="query 2"):
        score(rows, rows, [{0}, {1}, {3}])
    with pytest.raises(EmbeddingError, match="width"):
        score(rows, unit(np.eye(4)), [{0}] * 3)
    with pytest.raises(EmbeddingError, match="at least one row"):
        score(rows[:0], rows, [])
    with pytest.raises(ValueError, match="k is 4"):
        nearest(rows, rows, 4)


def test_nearest_is_sorted_and_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "CHUNK", 100)
    rng = np.random.default_rng(1)
    queries, candidates = unit(rng.standard_normal((13, 6))), unit(rng.standard_normal((40, 6)))
    indices, cosines = nearest(queries, candidates, 5)
    full = queries.astype(np.float64) @ candidates.T.astype(np.float64)
    assert indices.shape == cosines.shape == (13, 5)
    np.testing.assert_allclose(cosines, -np.sort(-full, axis=1)[:, :5], atol=1e-6)  # float32 rows, normalised once more
    np.testing.assert_allclose(np.take_along_axis(full, indices, 1), cosines, atol=1e-6)
    two = unit(np.tile(np.eye(2), (45, 1)))
    assert (nearest(two[:1], two, 30)[0] == np.arange(0, 60, 2)).all()  # among equals the lower index comes first
