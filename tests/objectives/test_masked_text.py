"""Cross-entropy at the chosen positions against plain numpy."""

import dataclasses
import re

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


@pytest.mark.parametrize("chunk_tokens", [1, 3, 6, 9, 12, None])
def test_chunks_give_the_loss_and_gradients_of_the_whole(rng, stub, chosen, chunk_tokens):
    """Chunks of 1, 1, 2, 3, 4 and all columns of the budget of 4; 3 do not divide it."""
    hidden = jnp.asarray(rng.standard_normal((B, T, D), np.float32))
    at, ids = chosen

    def naive(hidden, head):
        scores = jax.nn.log_softmax(jnp.take_along_axis(hidden, jnp.maximum(at, 0)[..., None], axis=1) @ head)
        true = jnp.take_along_axis(scores, jnp.maximum(ids, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(true * (ids >= 0)) / np.sum(ids >= 0)

    def ours(hidden, head):
        return masked_text_loss(dataclasses.replace(stub, head=head), hidden, at, ids, chunk_tokens)[0]

    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, jnp.asarray(stub.head))
    want = jax.value_and_grad(naive, (0, 1))(hidden, jnp.asarray(stub.head))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # float32, summed in another order
    _, metrics = masked_text_loss(stub, hidden, at, ids, chunk_tokens)
    np.testing.assert_allclose(metrics["masked_accuracy"], plain(hidden, stub.head, at, ids)[1], rtol=1e-6)


@pytest.mark.parametrize(("chunk_tokens", "columns"), [(8, 2), (16, 4), (None, 32)])
def test_no_more_scores_at_once_than_a_chunk_has(chunk_tokens, columns):
    """What the compiled gradient holds of the vocabulary: a chunk of each row, never [B, T, V], nor [B, M, V]."""
    rows, tokens, budget, width, vocabulary = 4, 64, 32, 8, 997  # a prime that no other size is
    head = jnp.zeros((width, vocabulary))

    def loss(hidden, head, at):
        return masked_text_loss(Stub(None, head), hidden, at, at, chunk_tokens)[0]

    at = jnp.zeros((rows, budget), jnp.int32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.zeros((rows, tokens, width)), head, at).compile()
    sizes = [
        np.prod([int(side) for side in sides.split(",")]) for sides in re.findall(r"\[([\d,]+)\]", compiled.as_text())
    ]
    assert max(size for size in sizes if size % vocabulary == 0) == rows * columns * vocabulary


def test_a_tie_is_no_right_guess(stub, chosen):
    """Equal scores for all ids say nothing, wherever the true one stands."""
    _, metrics = masked_text_loss(dataclasses.replace(stub, head=np.zeros((D, V))), np.zeros((B, T, D)), *chosen)
    assert metrics["masked_accuracy"] == 0


def test_bridge_loss_is_the_masked_loss_of_the_batch(rng, stub, chosen):
    at, ids = chosen
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    unused = {"positions": (B, T, 3), "token_start": (B, T), "token_end": (B, T), "unit": (B, T), "patches": (B, 0, 6)}
    unused |= {"patch_positions": (B, 0, 2), "patch_start": (B, 0), "patch_end": (B, 0)}
    batch = {name: np.zeros(shape, np.int32) for name, shape in unused.items()} | {"tokens": tokens}
    loss, metrics = bridge_loss(stub, {**batch, "predict_at": at, "predict_id": ids})
    np.testing.assert_allclose(loss, plain(stub.table[tokens], stub.head, at, ids)[0], rtol=1e-6)
    assert metrics["bridge"] == loss and metrics["masked_tokens"] == 5
