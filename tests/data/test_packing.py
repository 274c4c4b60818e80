"""Row plans are exact covers within capacities, and shares of rows put together are the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.data.packing import PackingError, RowsConfig, check_fits, choose_rows, plan_rows, share

lengths = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 80)), max_size=60)


@given(lengths=lengths, per_row=st.integers(1, 6))
def test_every_example_is_in_one_row_within_capacities(lengths, per_row):
    tokens, patches = [t for t, _ in lengths], [p for _, p in lengths]
    rows = plan_rows(tokens, patches, 50, 80, per_row)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert 0 < len(row) <= per_row
        assert sum(tokens[i] for i in row) <= 50 and sum(patches[i] for i in row) <= 80
    assert rows == plan_rows(tokens, patches, 50, 80, per_row)


@given(lengths=lengths)
def test_no_two_rows_could_be_one(lengths):
    """First fit leaves no later row whose first example would have fitted into an earlier one."""
    tokens, patches = [t for t, _ in lengths], [p for _, p in lengths]
    rows = plan_rows(tokens, patches, 50, 80, 1000)
    for early in range(len(rows)):
        for late in range(early + 1, len(rows)):
            merged = [*rows[early], rows[late][0]]
            assert sum(tokens[i] for i in merged) > 50 or sum(patches[i] for i in merged) > 80


def test_the_fill_is_high_on_mixed_lengths():
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(4.5, 0.8, 1000).astype(int), 4, 2048)
    rows = plan_rows(tokens, np.zeros(1000, int), 2048, 0, 64)
    assert tokens.sum() / (len(rows) * 2048) > 0.92


@given(needed=st.integers(0, 200), buckets=st.sets(st.integers(1, 64), min_size=1, max_size=4))
def test_the_smallest_bucket_is_taken(needed, buckets):
    ascending = sorted(buckets)
    rows, step = choose_rows(needed, ascending), np.gcd.reduce(ascending)
    assert rows >= needed and rows % step == 0
    if needed <= ascending[-1]:
        assert rows == min(b for b in ascending if b >= needed)
    else:
        assert rows - needed < step


@given(parts=st.integers(1, 8), each=st.integers(1, 9))
def test_shares_are_the_whole(parts, each):
    rows = list(range(parts * each))
    assert [r for i in range(parts) for r in rows[share(len(rows), i, parts)]] == rows


def test_refusals_name_value_limit_and_remedy():
    with pytest.raises(
        PackingError, match=r"example 1: 51 tokens, a row holds 50: lower max_pixels or raise rows.tokens"
    ):
        plan_rows([5, 51], [0, 0], 50, 80, 4)
    with pytest.raises(PackingError, match="example 0: 81 patches, a row holds 80"):
        plan_rows([5], [81], 50, 80, 4)
    with pytest.raises(PackingError, match="cat: 9 patches, a row holds 8"):
        check_fits(4, 9, RowsConfig(1, 4, 8, (1,), 1, 1), "cat")
    with pytest.raises(PackingError, match="7 rows cannot be shared by 2"):
        share(7, 0, 2)
    with pytest.raises(PackingError, match="process_index is 2 of 2"):
        share(8, 2, 2)


@pytest.mark.parametrize(
    "change", [{"rows": ()}, {"rows": (8, 4)}, {"rows": (0,)}, {"tokens": 0}, {"masked_per_row": 3}, {"batch_size": 0}]
)
def test_row_settings_that_contradict_are_refused(change):
    good = {"batch_size": 8, "tokens": 64, "patches": 64, "rows": (4, 8), "examples_per_row": 4, "masked_per_row": 16}
    RowsConfig(**good)
    with pytest.raises(PackingError):
        RowsConfig(**good | change)
