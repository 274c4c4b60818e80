"""The scorer against an oracle that sorts, and its refusals."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_jax.evaluation import scorer
from cocoa_jax.evaluation.scorer import EmbeddingError, nearest, rank, score


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
    with pytest.raises(EmbeddingError, match=r"2 of 4 queries are not finite.*lower learning rate"):
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


# ------------------------------------------------------------------------------- lists of candidates, as MMEB has them


def plain(query: np.ndarray, candidates: np.ndarray, listed: list[int], right: set[int]) -> tuple[int, int, bool]:
    """Wrong candidates above and not below the best right one, and argmax over the list as it is stored."""
    cosines = [float(np.float64(query) @ np.float64(candidates[c])) for c in listed]
    best = max(cosine for cosine, c in zip(cosines, listed, strict=True) if c in right)
    wrong = {c: cosine for cosine, c in zip(cosines, listed, strict=True) if c not in right}
    above = sum(cosine > best + 1e-7 for cosine in wrong.values())
    return above, sum(cosine >= best - 1e-7 for cosine in wrong.values()), int(np.argmax(np.round(cosines, 6))) == 0


@settings(max_examples=200, deadline=None)
@given(tasks(), st.data(), st.integers(1, 60))
def test_ranks_of_lists_are_those_of_plain_numpy(task, data, chunk: int) -> None:
    """Lists with repeated candidates, ties everywhere, the right one first."""
    queries, candidates, relevant = task
    places = st.lists(st.integers(0, len(candidates) - 1), max_size=12)
    right = [min(one) for one in relevant]
    lists = [[one, *data.draw(places)] for one in right]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "CHUNK", chunk)
        ranks = rank(queries, candidates, [{one} for one in right], [np.array(one, np.int32) for one in lists])
    expected = [plain(q, candidates, one, {r}) for q, one, r in zip(queries, lists, right, strict=True)]
    assert ranks.above.tolist() == [above for above, _, _ in expected]
    assert ranks.level.tolist() == [level for _, level, _ in expected]
    # The published rule differs from ours exactly where there is a tie at the top.
    assert (ranks.above == 0).tolist() == [first for _, _, first in expected]


def test_random_lists_are_ranked_as_plain_numpy_ranks_them() -> None:
    rng = np.random.default_rng(2)
    queries, candidates = unit(rng.standard_normal((80, 12))), unit(rng.standard_normal((300, 12)))
    candidates[17] = candidates[200]  # a tie between two contents
    lists = [rng.integers(0, 300, 60).astype(np.int32) for _ in range(80)]
    ranks = rank(queries, candidates, [{int(one[0])} for one in lists], lists)
    for q, listed in enumerate(lists):
        above, level, _ = plain(queries[q], candidates, listed.tolist(), {int(listed[0])})
        assert (ranks.above[q], ranks.level[q]) == (above, level)
        assert ranks.right[q] == pytest.approx(float(queries[q] @ candidates[listed[0]]), abs=1e-6)  # float32


def test_what_is_left_out_of_a_query_is_as_if_it_were_in_no_list(monkeypatch) -> None:
    monkeypatch.setattr(scorer, "CHUNK", 70)  # three queries
    rng = np.random.default_rng(4)
    queries, candidates = unit(rng.standard_normal((20, 8))), unit(rng.standard_normal((30, 8)))
    relevant = [{int(one)} for one in rng.integers(0, 30, 20)]
    left_out = (queries @ candidates.T).argmax(axis=1)
    left_out[:4] = -1
    ranks = rank(queries, candidates, relevant, left_out=left_out)
    lists = [
        np.setdiff1d(np.arange(30), [one] if {one} != right else [])
        for one, right in zip(left_out, relevant, strict=True)
    ]
    expected = rank(queries, candidates, relevant, lists)
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(ranks, name), values, err_msg=name)
    assert (ranks.level < rank(queries, candidates, relevant).level).sum() > 10
    with pytest.raises(ValueError, match="20 candidates to leave out for 19 queries"):
        rank(queries[:19], candidates, relevant[:19], left_out=left_out)


def test_what_nan_would_score_by_the_published_rule_is_refused() -> None:
    rows = np.full((4, 8), np.nan, np.float32)
    assert np.mean([int(np.argmax(rows @ row)) == 0 for row in rows]) == 1  # a broken model, 100 %
    with pytest.raises(EmbeddingError, match="4 of 4 queries are not finite"):
        rank(rows, rows, [{0}] * 4, [np.arange(4, dtype=np.int32)] * 4)


def test_lists_that_do_not_fit_are_refused() -> None:
    rows = unit(np.eye(3))
    with pytest.raises(ValueError, match="2 lists of candidates for 3 queries"):
        rank(rows, rows, [{0}] * 3, [np.array([0])] * 2)
    with pytest.raises(ValueError, match="query 1 go from -1 to 0"):
        rank(rows, rows, [{0}] * 3, [np.array([0]), np.array([0, -1]), np.array([0])])


def test_a_thousand_queries_need_little_memory() -> None:
    rng = np.random.default_rng(3)
    queries, candidates = unit(rng.standard_normal((1000, 64))), unit(rng.standard_normal((5000, 64)))
    lists = [np.append(q, rng.integers(0, 5000, 999)).astype(np.int32) for q in range(1000)]
    tracemalloc.start()
    rank(queries, candidates, [{q} for q in range(1000)], lists)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The whole matrix alone is 40 MB in float64, with what is compared 160; a chunk is 16 MiB and its four parts.
    assert peak < 100e6, peak


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_several_tokens_are_compared_with_the_nearest(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    queries, candidates = (
        np.concatenate([unit(rng.standard_normal((n, 5))) for _ in range(tokens)], axis=1) / tokens**0.5 for n in (4, 9)
    )
    relevant = [{int(rng.integers(9))} for _ in range(4)]
    ranks = rank(queries, candidates, relevant, tokens=tokens)
    for q, right in enumerate(relevant):
        asked = np.split(queries[q], tokens)
        near = [np.mean([max(a @ b for b in np.split(c, tokens)) for a in asked]) * tokens for c in candidates]
        (own,) = right
        assert ranks.right[q] == pytest.approx(near[own], abs=1e-6)  # rows are float32 of unit length
        assert ranks.above[q] == sum(value > near[own] + 1e-6 for c, value in enumerate(near) if c != own)
