"""Row plans are exact covers within capacities, and shares of rows put together are the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.data.packing import ALONE, PackingError, RowsConfig, RowShare, check_fits, plan_batch, plan_rows

ROOM = (50, 80, 20)
examples = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 80), st.integers(0, 20)), max_size=60)


def table(lengths) -> np.ndarray:
    return np.array(lengths, np.int64).reshape(-1, 3)


@given(lengths=examples.map(table), per_row=st.integers(1, 6))
def test_every_example_is_in_one_row_within_capacities(lengths, per_row):
    rows = plan_rows(lengths, ROOM, per_row)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert 0 < len(row) <= per_row
        assert (lengths[row].sum(axis=0) <= ROOM).all()
    assert rows == plan_rows(lengths, ROOM, per_row)


@given(lengths=examples.map(table))
def test_no_two_rows_could_be_one(lengths):
    """First fit leaves no later row whose first example would have fitted into an earlier one."""
    rows = plan_rows(lengths, ROOM, 1000)
    for early in range(len(rows)):
        for late in range(early + 1, len(rows)):
            assert (lengths[[*rows[early], rows[late][0]]].sum(axis=0) > ROOM).any()


@given(lengths=examples.map(table), data=st.data())
def test_consecutive_rows_of_a_plan_planned_alone_are_the_same_rows(lengths, data):
    """Inference relies on it: the contents of a batch's rows never need more rows than they had."""
    rows = plan_rows(lengths, ROOM, 4)
    first = data.draw(st.integers(0, len(rows)))
    part = rows[first : first + data.draw(st.integers(0, len(rows)))]
    chosen = np.sort(np.concatenate([np.zeros(0, int), *part])).astype(int)
    assert [chosen[row].tolist() for row in plan_rows(lengths[chosen], ROOM, 4)] == part


def test_the_fill_is_high_on_mixed_lengths():
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(4.5, 0.8, 1000).astype(int), 4, 2048)
    rows = plan_rows(np.stack([tokens, 0 * tokens, 0 * tokens], 1), (2048, 0, 1), 64)
    assert tokens.sum() / (len(rows) * 2048) > 0.92


def config(*shapes, **more) -> RowsConfig:
    return RowsConfig(**{"batch_size": 8, "examples_per_row": 4, "masked_per_row": 20} | more, shapes=shapes)


@given(lengths=examples.map(table), rows=st.lists(st.integers(1, 20), min_size=3, max_size=3))
def test_the_first_shape_that_holds_a_batch_is_taken(lengths, rows):
    few, more, most = np.cumsum(rows).tolist()
    settings = config((few, 30, 80), (more, 50, 40), (more, 50, 80), (most, 50, 80))
    shape, plan = plan_batch(lengths, settings)
    assert len(plan) <= shape.rows and sorted(i for row in plan for i in row) == list(range(len(lengths)))
    room = (shape.tokens, shape.patches, 20)
    assert all((lengths[row].sum(axis=0) <= room).all() and len(row) <= 4 for row in plan)
    for b, t, p in settings.shapes:
        if shape == (b, t, p):
            return
        fits = (lengths <= (t, p, 20)).all()
        assert not fits or len(plan_rows(lengths, (t, p, 20), 4)) > b
    assert shape[1:] == (50, 80) and shape.rows % settings.step == 0
    assert most < len(plan) and shape.rows - len(plan) < settings.step


@given(st.permutations(range(6)), st.sampled_from([1, 2, 3, 6]), st.integers(1, 4))
def test_shares_are_the_whole_in_whatever_order_hosts_hold_its_blocks(order, parts, size):
    """As on a mesh: a host holds its blocks in ascending order, and together they hold every row once."""
    shares = [RowShare(tuple(sorted(order[part::parts])), 6) for part in range(parts)]
    held = {
        block: row
        for one in shares
        for block, row in zip(one.blocks, np.reshape(one.of(6 * size), (-1, size)), strict=True)
    }
    np.testing.assert_array_equal(np.stack([held[block] for block in range(6)]).ravel(), np.arange(6 * size))
    assert {one.count for one in shares} == {parts} and ALONE.of(5) == [0, 1, 2, 3, 4]


@given(parts=st.integers(1, 8), rows=st.lists(st.integers(1, 9), min_size=2, max_size=2))
def test_rows_are_rounded_up_to_what_the_devices_share(parts, rows):
    settings = config((rows[0], 50, 40), (sum(rows) + rows[0], 50, 80)).divisible_by(parts)
    settings.check_shared(parts, "devices")
    assert settings.widest[1:] == (50, 80) and settings.step % parts == 0
    assert all(
        b - parts < wanted for (b, _, _), wanted in zip(settings.shapes, (rows[0], sum(rows) + rows[0]), strict=True)
    )


def test_refusals_name_value_limit_and_remedy():
    message = r"example 1: 51 tokens, a row holds 50: lower max_pixels or widen rows.shapes"
    with pytest.raises(PackingError, match=message):
        plan_rows(table([(5, 0, 0), (51, 0, 0)]), ROOM, 4)
    with pytest.raises(PackingError, match="example 0: 81 patches, a row holds 80"):
        plan_rows(table([(5, 81, 0)]), ROOM, 4)
    with pytest.raises(PackingError, match="cat: 9 patches, a row holds 8"):
        check_fits(4, 9, config((1, 4, 8)), "cat")
    with pytest.raises(PackingError, match="7 rows cannot be shared by 2"):
        RowShare((0,), 2).of(7)
    with pytest.raises(
        PackingError, match=r"the 6 rows of \(6, 9, 9\) cannot be shared by 4 devices: change data.rows.shap"
    ):
        config((4, 9, 8), (6, 9, 9)).check_shared(4, "devices")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ()}, r"give \[rows, tokens, patches\]"),
        ({"shapes": ((0, 64, 64),)}, r"give \[rows, tokens, patches\]"),
        ({"shapes": ((4, 0, 64),)}, r"give \[rows, tokens, patches\]"),
        ({"shapes": ((8, 64, 64), (4, 64, 64))}, r"has \(4, 64, 64\) behind \(8, 64, 64\)"),
        ({"shapes": ((8, 64, 64), (8, 64, 64))}, "list the cheap first"),
        ({"shapes": ((4, 64, 32), (8, 32, 64))}, "none has both 64 tokens and 64 patches"),
        ({"masked_per_row": 0}, "start at 1"),
        ({"examples_per_row": 0}, "start at 1"),
        ({"batch_size": 0}, "start at 1"),
    ],
    ids=str,
)
def test_row_settings_that_contradict_are_refused(change, message):
    good = {"batch_size": 8, "shapes": ((4, 64, 64), (8, 48, 64)), "examples_per_row": 4, "masked_per_row": 16}
    RowsConfig(**good)
    with pytest.raises(PackingError, match=message):
        RowsConfig(**good | change)
