"""Cross-entropy at the chosen positions against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoa_jax.objectives.bridge import bridge_loss
from cocoa_jax.objectives.masked_text import masked_text_loss

B, T, D, V, M = 3, 11, 5, 13, 4


@dataclasses.dataclass(frozen=True)
class Stub:
    """A model that is nothing but two tables: a state per token, and the LM head."""

    table: np.ndarray
    head: np.ndarray

    def __call__(self, inputs):
        return jnp.take(jnp.asarray(self.table), inputs.tokens, axis=0)

    def head_kernel(self):
        return self.head

    def logits(self, hidden, kernel):
        return hidden @ kernel


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def stub(rng):
    return Stub(rng.standard_normal((V, D), np.float32), rng.standard_normal((D, V), np.float32))


def plain(hidden, head, at, ids):
    """Mean cross-entropy and accuracy over all chosen positions of the batch, float64."""
    losses, right = [], []
    for row, column in zip(*np.nonzero(ids >= 0), strict=True):
        scores = np.float64(hidden[row, at[row, column]]) @ np.float64(head)
        losses.append(np.log(np.exp(scores).sum()) - scores[ids[row, column]])
        right.append(scores.argmax() == ids[row, column])
    return np.mean(losses), np.mean(right), len(losses)


@pytest.fixture
def chosen(rng):
    """predict_at and predict_id; rows use 4, 1 and 0 of their budget of 4."""
    at, ids = np.full((2, B, M), -1, np.int32)
    for row, count in enumerate((4, 1, 0)):
        at[row, :count] = rng.permutation(T)[:count]
        ids[row, :count] = rng.integers(0, V, count)
    return at, ids


def test_against_numpy(rng, stub, chosen):
    hidden = rng.standard_normal((B, T, D), np.float32)
    loss, metrics = masked_text_loss(stub, hidden, *chosen)
    want, right, count = plain(hidden, stub.head, *chosen)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["masked_accuracy"], right, rtol=1e-6)
    assert metrics["masked_tokens"] == count == 5


def test_every_position_weighs_the_same_wherever_it_lies(rng, stub, chosen):
    """A mean over positions, not over rows: the same positions spread over other rows give the same loss."""
    hidden = rng.standard_normal((B, T, D), np.float32)
    at, ids = chosen
    other_at, other_ids = np.full((2, 2 * B, M), -1, np.int32)
    for place, (row, column) in enumerate(zip(*np.nonzero(ids >= 0), strict=True)):
        other_at[row + B * (place % 2), M - 1 - column], other_ids[row + B * (place % 2), M - 1 - column] = (
            at[row, column],
            ids[row, column],
        )
    loss, _ = masked_text_loss(stub, hidden, at, ids)
    other, _ = masked_text_loss(stub, np.concatenate([hidden, hidden]), other_at, other_ids)
    np.testing.assert_allclose(other, loss, rtol=1e-6)


def test_only_chosen_states_have_a_gradient(rng, stub, chosen):
    hidden = rng.standard_normal((B, T, D), np.float32)
    at, ids = chosen
    gradient = jax.grad(lambda hidden: masked_text_loss(stub, hidden, at, ids)[0])(hidden)
    want = np.zeros((B, T), bool)
    for row, column in zip(*np.nonzero(ids >= 0), strict=True):
        want[row, at[row, column]] = True
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, want)


def test_nothing_chosen_is_no_loss_and_no_nan(rng, stub):
    hidden = rng.standard_normal((B, T, D), np.float32)
    nothing = np.full((B, M), -1, np.int32)
    loss, gradient = jax.value_and_grad(lambda hidden: masked_text_loss(stub, hidden, nothing, nothing)[0])(hidden)
    assert loss == 0 and not np.asarray(gradient).any()


def test_scores_of_any_size_stay_finite(stub, chosen):
    loss, _ = masked_text_loss(stub, np.full((B, T, D), 1e4, np.float32), *chosen)
    assert np.isfinite(loss)


def test_bridge_loss_is_the_masked_loss_of_the_batch(rng, stub, chosen):
    at, ids = chosen
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    unused = {"positions": (B, T, 3), "token_start": (B, T), "token_end": (B, T), "unit": (B, T), "patches": (B, 0, 6)}
    unused |= {"patch_positions": (B, 0, 2), "patch_start": (B, 0), "patch_end": (B, 0)}
    batch = {name: np.zeros(shape, np.int32) for name, shape in unused.items()} | {"tokens": tokens}
    loss, metrics = bridge_loss(stub, {**batch, "predict_at": at, "predict_id": ids})
    np.testing.assert_allclose(loss, plain(stub.table[tokens], stub.head, at, ids)[0], rtol=1e-6)
    assert metrics["bridge"] == loss and metrics["masked_tokens"] == 5
