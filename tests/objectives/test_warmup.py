"""Hiding pictures and rebuilding them: what is hidden never reaches the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.objectives.warmup import WarmupConfig, hide_units, token_of_unit, warmup_loss

B, T, U, C, V = 2, 12, 6, 5, 9
P = 4 * U
HIDDEN = np.array([[True, False, True, True, False, False], [False, True, False, False, True, False]])
SEEDS = np.arange(B * U, dtype=np.uint32).reshape(B, U) * 7919


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def patches(rng):
    return rng.standard_normal((B, P, C), np.float32)


def in_units(patches) -> np.ndarray:
    return np.asarray(patches).reshape(B, U, 4, C)


def test_hidden_units_are_noise_and_the_others_are_themselves(patches):
    shown = in_units(hide_units(patches, HIDDEN, SEEDS))
    np.testing.assert_array_equal(shown[~HIDDEN], in_units(patches)[~HIDDEN])
    assert (shown[HIDDEN] != in_units(patches)[HIDDEN]).all()


def test_true_pixels_of_hidden_units_never_reach_the_model(patches, rng):
    other = in_units(patches).copy()
    other[HIDDEN] = rng.standard_normal(other[HIDDEN].shape)
    other = other.reshape(patches.shape)
    np.testing.assert_array_equal(hide_units(patches, HIDDEN, SEEDS), hide_units(other, HIDDEN, SEEDS))
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(hide_units(x, HIDDEN, SEEDS))))(patches)
    assert not in_units(gradient)[HIDDEN].any() and in_units(gradient)[~HIDDEN].all()


def test_noise_is_a_function_of_the_seed_alone(patches):
    noise = in_units(hide_units(patches, np.ones_like(HIDDEN), SEEDS)).reshape(B * U, -1)
    assert len(np.unique(noise[:, 0])) == B * U and len(np.unique(noise)) == noise.size
    moved = hide_units(patches[:, ::-1], np.ones_like(HIDDEN), SEEDS[::-1, ::-1])
    np.testing.assert_array_equal(in_units(moved)[::-1, ::-1].reshape(B * U, -1), noise)


def test_noise_is_standard_normal():
    units = 500
    seeds = np.random.default_rng(1).integers(0, 2**32, (1, units), np.uint32)
    noise = np.asarray(hide_units(np.zeros((1, 4 * units, 20), np.float32), np.ones((1, units), bool), seeds)).ravel()
    # 40,000 draws: the mean strays by 0.005, the deviation by 0.0035; six times that.
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.021
    assert abs(np.mean(np.abs(noise) < 1) - 0.6827) < 0.015
    assert abs(np.corrcoef(noise.reshape(units, -1)[:-1].ravel(), noise.reshape(units, -1)[1:].ravel())[0, 1]) < 0.03


def test_half_precision_stays(patches):
    assert hide_units(jnp.asarray(patches, jnp.bfloat16), HIDDEN, SEEDS).dtype == jnp.bfloat16


@given(st.integers(0, 2**32 - 1))
def test_token_of_unit_is_the_inverse_of_unit(seed):
    rng = np.random.default_rng(seed)
    unit, want = np.full((B, T), -1, np.int32), np.zeros((B, U), np.int32)
    for row in range(B):
        shown = rng.permutation(U)[: rng.integers(0, U + 1)]
        columns = rng.permutation(T)[: len(shown)]
        unit[row, columns], want[row, shown] = shown, columns
    got = np.asarray(token_of_unit(unit, U))
    np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------------------------------- the whole loss of the stage


@dataclasses.dataclass(frozen=True)
class Stub:
    """States are token embeddings, plus what the token's unit looks like; the head is a table."""

    table: np.ndarray
    see: np.ndarray
    head: np.ndarray

    def __call__(self, inputs):
        words = jnp.take(jnp.asarray(self.table), inputs.tokens, axis=0)
        units = inputs.patches.reshape(B, U, 4 * C) @ self.see
        seen = jnp.take_along_axis(units, jnp.maximum(inputs.unit, 0)[..., None], axis=1)
        # Every state hears of every picture of the row, as under attention.
        return jnp.where(inputs.unit[..., None] >= 0, seen, words) + units.mean(1, keepdims=True)

    def head_kernel(self):
        return self.head

    def logits(self, hidden, kernel):
        return hidden @ kernel


@pytest.fixture
def parts(rng, patches):
    D = 8
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    model, pixels = Stub(draw(V, D), draw(4 * C, D), draw(D, V)), draw(D, 4 * C)

    def decoder(hidden, positions, spans, columns):
        del positions, spans
        return jnp.take_along_axis(hidden, columns[..., None], axis=1) @ pixels

    unit = np.full((B, T), -1, np.int32)
    unit[:, 2 : 2 + U] = rng.permutation(U)
    batch = {name: np.zeros((B, T), np.int32) for name in ("token_start", "token_end")}
    batch |= {name: np.zeros((B, P), np.int32) for name in ("patch_start", "patch_end")}
    batch |= {"positions": np.zeros((B, T, 3), np.int32), "patch_positions": np.zeros((B, P, 2), np.int32)}
    batch |= {"tokens": rng.integers(0, V, (B, T)).astype(np.int32), "unit": unit, "patches": patches}
    batch |= {"predict_at": np.array([[9, -1], [10, 11]]), "predict_id": np.array([[3, -1], [0, 5]])}
    return model, decoder, batch | {"hidden_unit": HIDDEN, "unit_seed": SEEDS}


def test_loss_is_text_plus_weighted_pictures(parts):
    model, decoder, batch = parts
    loss, metrics = warmup_loss(model, decoder, batch, WarmupConfig(mae_weight=0.3))
    np.testing.assert_allclose(loss, metrics["mntp"] + 0.3 * metrics["mae"], rtol=1e-6)
    # Against numpy: only hidden units count, each with the mean of its squared errors.
    shown = np.asarray(hide_units(batch["patches"], HIDDEN, SEEDS)).reshape(B, U, -1) @ model.see
    drawn = np.asarray(decoder(shown + shown.mean(1, keepdims=True), None, None, np.arange(U)[None].repeat(B, 0)))
    errors = np.square(drawn - batch["patches"].reshape(B, U, -1)).mean(-1)
    np.testing.assert_allclose(metrics["mae"], errors[HIDDEN].mean(), rtol=1e-5)


def test_hidden_pixels_change_the_target_and_no_input(parts, rng):
    model, decoder, batch = parts
    other = in_units(batch["patches"]).copy()
    other[HIDDEN] = rng.standard_normal(other[HIDDEN].shape)
    other = {**batch, "patches": other.reshape(batch["patches"].shape)}
    (_, before), (_, after) = (warmup_loss(model, decoder, x, WarmupConfig()) for x in (batch, other))
    assert before["mntp"] == after["mntp"] and abs(before["mae"] - after["mae"]) > 1e-3
    other = in_units(batch["patches"]).copy()
    other[~HIDDEN] += 1
    other = {**batch, "patches": other.reshape(batch["patches"].shape)}
    assert abs(warmup_loss(model, decoder, other, WarmupConfig())[1]["mntp"] - before["mntp"]) > 1e-3


def test_no_hidden_unit_is_no_picture_loss(parts):
    model, decoder, batch = parts
    _, metrics = warmup_loss(model, decoder, {**batch, "hidden_unit": np.zeros_like(HIDDEN)}, WarmupConfig())
    assert metrics["mae"] == 0 and np.isfinite(metrics["mntp"])


def test_shared_noise_is_one_for_all_units_of_a_step_and_another_in_the_next(patches, monkeypatch):
    """What stands in the place of hidden units, as the model sees it."""
    shown = []

    class Seen(Exception):
        pass

    class Model:
        def __call__(self, inputs):
            shown.append(in_units(inputs.patches))
            raise Seen

    zeros, spans = np.zeros((B, T), np.int32), np.zeros((B, P), np.int32)
    batch = {
        "tokens": zeros, "positions": np.zeros((B, T, 3), np.int32), "token_start": zeros, "token_end": zeros,
        "unit": zeros - 1, "patches": patches, "patch_positions": np.zeros((B, P, 2), np.int32),
        "patch_start": spans, "patch_end": spans, "hidden_unit": HIDDEN, "unit_seed": SEEDS,
    }  # fmt: skip
    for step in (0, 0, 1):
        with pytest.raises(Seen):
            warmup_loss(Model(), None, {**batch, "step": jnp.int32(step)}, WarmupConfig(noise="shared"))
    for one in shown:
        assert (one[HIDDEN] == one[HIDDEN][0]).all() and len(np.unique(one[HIDDEN][0])) == 4 * C
        np.testing.assert_array_equal(one[~HIDDEN], in_units(patches)[~HIDDEN])
    np.testing.assert_array_equal(shown[0], shown[1])
    assert (shown[0][HIDDEN] != shown[2][HIDDEN]).all()
