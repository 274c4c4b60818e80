"""Which tokens and units are hidden: ratios, guarantees, and independence from everything but (seed, step, example)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.data.masking import (
    MaskingConfig,
    Purpose,
    choose_tokens,
    choose_units,
    example_rng,
    within_budget,
)

allowed_tokens = st.lists(st.booleans(), max_size=40).map(lambda values: np.array(values, bool))
ratios = st.floats(0, 1)


@given(allowed=allowed_tokens, ratio=ratios, shift=st.booleans(), one=st.booleans(), seed=st.integers(0, 10))
def test_only_allowed_tokens_are_chosen(allowed, ratio, shift, one, seed):
    choice = choose_tokens(allowed, example_rng(seed, 0, 0, Purpose.TOKENS), ratio, shift, one)
    able = allowed.copy()
    if shift:
        able[:1] = False
    assert able[choice.index].all() and (np.diff(choice.index) > 0).all()
    assert len(choice.index) >= (one and able.any())
    if ratio == 1:
        assert len(choice.index) == able.sum()
    if ratio == 0:
        assert len(choice.index) == (one and able.any())


def test_the_first_token_can_be_chosen_without_the_shift():
    choice = choose_tokens(np.ones(3, bool), example_rng(0, 0, 0, Purpose.TOKENS), 1.0, False, False)
    assert choice.index.tolist() == [0, 1, 2]


@given(able=allowed_tokens, ratio=ratios, seed=st.integers(0, 10))
def test_only_some_units_may_be_hidden_and_one_of_them_is(able, ratio, seed):
    hidden, seeds = choose_units(len(able), example_rng(seed, 0, 0, Purpose.UNITS), ratio, able)
    free, same = choose_units(len(able), example_rng(seed, 0, 0, Purpose.UNITS), ratio)
    assert hidden.sum() == max((free & able).sum(), able.any()) and not (hidden & ~able).any()
    assert (hidden >= (free & able)).all() and (seeds == same).all()


@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_the_ratio_holds(ratio):
    """40,000 draws: five standard deviations are 0.0115 at most."""
    allowed = np.ones(400, bool)
    hits = [
        len(choose_tokens(allowed, example_rng(3, 1, i, Purpose.TOKENS), ratio, False, False).index) for i in range(100)
    ]
    assert abs(np.sum(hits) / 40_000 - ratio) < 0.0115
    hidden = [choose_units(400, example_rng(3, 1, i, Purpose.UNITS), ratio)[0].sum() for i in range(100)]
    assert abs(np.sum(hidden) / 40_000 - ratio) < 0.0115


def test_draws_depend_on_seed_step_example_and_purpose():
    draws = [
        example_rng(*key).random() for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    ]
    assert len(set(draws)) == 5 and draws[0] == example_rng(0, 0, 0, Purpose.RECORD).random()


def test_units_have_seeds_of_their_own():
    hidden, seeds = choose_units(64, example_rng(0, 0, 0, Purpose.UNITS), 0.5)
    again = choose_units(64, example_rng(0, 0, 0, Purpose.UNITS), 0.9)
    assert seeds.dtype == np.uint32 and len(set(seeds.tolist())) == 64
    np.testing.assert_array_equal(seeds, again[1])
    assert (again[0] >= hidden).all()


@given(size=st.integers(1, 40), budget=st.integers(1, 30), ratio=ratios, seed=st.integers(0, 5))
def test_the_budget_un_chooses_the_fewest_and_never_the_only_token(size, budget, ratio, seed):
    rng = example_rng(seed, 0, 0, Purpose.TOKENS)
    choice = choose_tokens(np.ones(size, bool), rng, ratio, False, True)
    kept = within_budget(choice, budget)
    assert len(kept) == min(budget, len(choice.index)) and set(kept) <= set(choice.index)
    assert (np.diff(kept) > 0).all() and choice.index[np.argmin(choice.priority)] in kept


@pytest.mark.parametrize(
    "change", [{"text_ratio": 1.5}, {"image_ratio": -0.1}, {"text_ratio": float("nan")}, {"final_text_ratio": 2.0}]
)
def test_ratios_are_probabilities(change):
    with pytest.raises(ValueError, match=r"lies in 0..1"):
        MaskingConfig(**{"text_ratio": 0.2, "image_ratio": 0.5} | change)


@given(first=ratios, last=ratios, steps=st.integers(2, 50))
def test_a_ratio_moves_linearly_over_the_run_from_end_to_end(first, last, steps):
    masking = MaskingConfig(first, last, final_text_ratio=last, final_image_ratio=first)
    text = [masking.text_ratio_at(step, steps) for step in range(steps)]
    assert (text[0], text[-1]) == (first, last) and masking.image_ratio_at(steps - 1, steps) == first
    # Rounding of a product of numbers below 1.
    np.testing.assert_allclose(np.diff(text), (last - first) / (steps - 1), atol=1e-15)
    assert all(min(first, last) - 1e-15 <= ratio <= max(first, last) + 1e-15 for ratio in text)


@given(ratio=ratios, step=st.integers(0, 50))
def test_a_ratio_without_an_end_stays(ratio, step):
    masking = MaskingConfig(ratio, ratio)
    assert masking.text_ratio_at(step, 50) == ratio and masking.image_ratio_at(step, 50) == ratio
