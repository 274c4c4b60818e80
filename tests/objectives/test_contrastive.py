"""InfoNCE against plain numpy, who may be whose negative, and independence of the rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_jax.objectives.contrastive import ContrastiveConfig, contrastive_loss, info_nce, uniformity
from cocoa_jax.objectives.embedding import embed_examples, embed_in_chunks


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def case(seed: int, N=6, extra=0, W=7):
    rng = np.random.default_rng(seed)
    return unit(rng.standard_normal((N, W))), unit(rng.standard_normal((N + extra, W))), rng.integers(0, N, N)


def plain(queries, targets, key, config) -> tuple[float, float]:
    """Loss and accuracy, one query at a time, in float64."""
    N, cosines = len(queries), np.float64(queries) @ np.float64(targets).T

    def one(scores, own, kept):
        return np.log(np.exp(scores[kept] / config.temperature).sum()) - scores[own] / config.temperature

    losses, right = [], []
    for q in range(N):
        negatives = [t for t in range(len(targets)) if t != q and (t >= N or key[t] != key[q])]
        losses.append(one(cosines[q], q, [q, *negatives]))
        right.append(all(cosines[q, q] > cosines[q, t] for t in negatives))
    if config.symmetric:
        back = [one(cosines[:, t], t, [q for q in range(N) if q == t or key[q] != key[t]]) for t in range(N)]
        return (np.mean(losses) + np.mean(back)) / 2, np.mean(right)
    return np.mean(losses), np.mean(right)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("extra", [0, 4])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.floats(0.02, 1))
def test_against_numpy(symmetric, extra, seed, temperature):
    config = ContrastiveConfig(temperature, symmetric=symmetric)
    queries, targets, key = case(seed, extra=extra)
    loss, metrics = info_nce(queries, targets, key, config)
    want, right = plain(queries, targets, key, config)
    # float32 scores reach 1 / temperature = 50.
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(metrics["batch_accuracy"], right, rtol=1e-6)
    np.testing.assert_allclose(metrics["positive_cosine"], np.sum(queries * targets[:6], 1).mean(), atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_gradient_through_excluded_pairs(symmetric):
    queries, targets, _ = case(1, N=4)
    key = np.array([7, 8, 7, 9])
    config = ContrastiveConfig(0.1, symmetric=symmetric)

    def through(cosines):
        # With unit rows as queries the cosines are free inputs, so the gradient of each pair can be read off.
        return info_nce(jnp.eye(4), cosines.T, key, config)[0]

    gradient = np.asarray(jax.grad(through)(queries @ targets.T))
    excluded = (key[:, None] == key) & ~np.eye(4, dtype=bool)
    assert excluded.sum() == 2 and (gradient[excluded] == 0).all() and (gradient[~excluded] != 0).all()
    assert (np.diagonal(gradient) < 0).all() and (gradient[~excluded & ~np.eye(4, dtype=bool)] > 0).all()


def test_the_temperature_falls_geometrically_over_the_run():
    config = ContrastiveConfig(0.02, first_temperature=0.5)
    np.testing.assert_allclose([config.at(x) for x in (0.0, 0.5, 1.0)], [0.5, 0.1, 0.02], rtol=1e-6)
    assert ContrastiveConfig(0.02).at(0.3) == 0.02
    queries, targets, key = case(4)
    for progress, temperature in ((0.0, 0.5), (0.5, 0.1), (1.0, 0.02)):
        loss, _ = info_nce(queries, targets, key, config, progress)
        want, _ = plain(queries, targets, key, ContrastiveConfig(temperature))
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["temperature", "first_temperature"])
def test_a_temperature_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError, match=rf"contrastive\.{name} is 0: it must be positive"):
        ContrastiveConfig(**{name: 0})


def test_hard_negatives_count_for_every_query():
    queries, targets, key = case(2, N=4, extra=1)
    key = np.arange(4)
    gradient = np.asarray(
        jax.grad(lambda c: info_nce(jnp.eye(4), c.T, key, ContrastiveConfig(0.1, symmetric=True))[0])(
            queries @ targets.T
        )
    )
    assert (gradient[:, 4] > 0).all()


def test_all_of_one_key_is_no_loss_and_no_nan():
    queries, targets, _ = case(3, N=4)
    loss, gradient = jax.value_and_grad(
        lambda q: info_nce(q, targets, np.zeros(4), ContrastiveConfig(symmetric=True))[0]
    )(queries)
    assert abs(loss) < 1e-6 and np.isfinite(gradient).all()


def test_false_negatives_can_be_left_in():
    queries, targets, _ = case(3, N=4)
    kept = ContrastiveConfig(symmetric=True, false_negatives=True)
    alike = info_nce(queries, targets, np.zeros(4), kept, image_key=np.zeros(4))[0]
    different = info_nce(queries, targets, np.arange(4), ContrastiveConfig(symmetric=True))[0]
    np.testing.assert_array_equal(alike, different)


# ------------------------------------------------------------------------------------------- from rows to embeddings


@dataclasses.dataclass(frozen=True)
class Stub:
    """A model whose state is the embedding of the token."""

    table: np.ndarray

    def __call__(self, inputs):
        return jnp.take(jnp.asarray(self.table), inputs.tokens, axis=0)


def rows_of(bridges: np.ndarray, layout: list[list[int]], per_row: int) -> dict[str, np.ndarray]:
    """Rows in which each example is its bridge tokens behind two others; ``layout``: examples of each row."""
    X, K = bridges.shape
    B, T = len(layout), per_row * (K + 2)
    batch = {"tokens": np.zeros((B, T), np.int32), "pool": np.full((B, per_row, K), -1, np.int32)}
    batch["example"] = np.zeros(X, np.int32)
    for row, members in enumerate(layout):
        for slot, example in enumerate(members):
            columns = slot * (K + 2) + 2 + np.arange(K)
            batch["tokens"][row, columns], batch["pool"][row, slot] = bridges[example], columns
            batch["example"][example] = row * per_row + slot
    unused = {"positions": (B, T, 3), "token_start": (B, T), "token_end": (B, T), "unit": (B, T), "patches": (B, 0, 6)}
    unused |= {"patch_positions": (B, 0, 2), "patch_start": (B, 0), "patch_end": (B, 0)}
    return batch | {name: np.zeros(shape, np.int32) for name, shape in unused.items()}


@pytest.mark.parametrize("K", [1, 2])
def test_embeddings_are_the_unit_states_of_the_bridge_in_the_order_of_examples(K):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((30, 5)).astype(np.float32) * 10
    bridges = rng.permutation(np.arange(1, 30))[: 6 * K].reshape(6, K)
    got = embed_examples(Stub(table), rows_of(bridges, [[3, 0], [5], [1, 4, 2]], 3))
    want = np.concatenate([unit(table[bridges[:, k]]) for k in range(K)], axis=1) / np.sqrt(K)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_the_loss_does_not_depend_on_how_examples_fell_into_rows():
    rng = np.random.default_rng(0)
    stub, bridges = Stub(rng.standard_normal((40, 5)).astype(np.float32)), np.arange(1, 11)[:, None]
    key = {"target_key": np.array([0, 1, 0, 2])}  # 4 queries, their targets, and 2 hard negatives
    layouts = ([[i] for i in range(10)], [[9, 0, 4], [1, 2], [8, 7, 3], [5, 6]], [[*range(10)]])
    config = ContrastiveConfig(0.1, symmetric=True)
    losses = [contrastive_loss(lambda *_: stub, rows_of(bridges, layout, 10) | key, config)[0] for layout in layouts]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    other, _ = contrastive_loss(lambda *_: stub, rows_of(bridges[::-1], layouts[0], 10) | key, config)
    assert abs(other - losses[0]) > 1e-3


def test_a_state_of_zeros_gives_no_nan():
    stub, bridges = Stub(np.zeros((40, 5), np.float32)), np.arange(1, 5)[:, None]
    batch = rows_of(bridges, [[0, 1], [2, 3]], 2) | {"target_key": np.array([0, 1])}

    def loss(table):
        return contrastive_loss(lambda *_: dataclasses.replace(stub, table=table), batch, ContrastiveConfig())[0]

    assert np.isfinite(jax.grad(loss)(jnp.asarray(stub.table))).all()


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A model in which every state hears of its whole row, with a kernel in the type of its states."""

    table: jax.Array
    kernel: jax.Array

    def __call__(self, inputs):
        words = jnp.take(self.table, inputs.tokens, axis=0)
        return jnp.tanh(words @ self.kernel + words.mean(1, keepdims=True))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize(("wide", "tolerance"), [(False, 1e-5), (True, 1e-10)])
def test_chunks_give_the_loss_and_gradients_of_the_whole_batch(rows, remat, wide, tolerance):
    rng = np.random.default_rng(5)
    bridges = np.arange(1, 25)[:, None]
    layout = [[0, 5, 9, 22], [1, 2, 3, 4], [6, 7], [8, 10, 11, 12, 23], [13, 14, 15, 16], [17, 18, 19, 20, 21]]
    batch = rows_of(bridges, layout, 5) | {"target_key": rng.integers(0, 8, 10)}  # 10 pairs and 4 hard negatives
    with jax.enable_x64(wide):
        kind = jnp.float64 if wide else jnp.float32
        params = jnp.asarray(rng.standard_normal((40, 6)), kind), jnp.asarray(rng.standard_normal((6, 6)), kind)

        def run(rows):
            def loss(params):
                return contrastive_loss(lambda *_: Mixer(*params), batch, ContrastiveConfig(0.1), 1.0, rows, remat)[0]

            return jax.jit(jax.value_and_grad(loss))(params)

        got, want = run(rows), run(None)
        assert want[0].dtype == kind
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize(("remat", "times"), [(True, 2), (False, 1)])
def test_chunks_are_computed_again_only_where_that_is_asked_for(remat, times):
    batch = rows_of(np.arange(1, 13)[:, None], [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]], 2)

    def total(table):
        return embed_in_chunks(lambda *_: Stub(jnp.sin(table)), batch, 2, remat=remat)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(total))(jnp.ones((40, 5))))
    assert program.count("= sin") == times, program


def test_every_chunk_has_a_model_of_its_own():
    """What is random in a model must not repeat itself from chunk to chunk."""
    table, bridges = jnp.ones((40, 5)), np.arange(1, 13)[:, None]
    batch = rows_of(bridges, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]], 2)
    marks = 1.0 + jnp.arange(15.0).reshape(3, 5)
    found, lengths = embed_in_chunks(lambda number, count: Stub(table * marks[number] * count), batch, 2)
    np.testing.assert_allclose(found, np.repeat(unit(np.asarray(marks)), 4, axis=0), rtol=1e-6)
    np.testing.assert_allclose(lengths, np.repeat(3 * np.linalg.norm(marks, axis=1), 4), rtol=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_uniformity_is_that_of_wang_and_isola_over_queries_and_the_targets_of_others(seed):
    queries, targets, key = case(seed, extra=3)
    _, metrics = info_nce(queries, targets, key, ContrastiveConfig(0.1))
    pairs = [(q, t) for q in range(6) for t in range(9) if q != t and (t >= 6 or key[q] != key[t])]
    want = np.log(np.mean([np.exp(-2 * np.sum(np.square(np.float64(queries[q]) - targets[t]))) for q, t in pairs]))
    np.testing.assert_allclose(metrics["uniformity"], want, rtol=1e-5, atol=1e-5)  # float32 cosines, times 4


def test_uniformity_of_rows_that_are_all_alike_is_0_and_of_opposite_ones_minus_8():
    cosines, pairs = np.ones((3, 3), np.float32), ~np.eye(3, dtype=bool)
    np.testing.assert_allclose([uniformity(cosines, pairs), uniformity(-cosines, pairs)], [0, -8], atol=1e-6)
    assert np.isfinite(uniformity(cosines, np.zeros((3, 3), bool)))


def test_chunks_that_do_not_divide_the_rows_are_refused():
    batch = rows_of(np.arange(1, 13)[:, None], [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]], 2)
    with pytest.raises(ValueError, match=r"chunk_rows is 4, a device has 6 rows: choose a divisor"):
        embed_in_chunks(lambda *_: Stub(np.ones((40, 5))), batch, 4)


def test_rows_of_one_picture_and_equal_negatives_are_no_negatives():
    """Against one query at a time: equal targets, equal query pictures and hard negatives equal to a target are out."""
    queries, targets, key = case(3, N=6, extra=4)
    image, negative = np.array([0, -1, 0, 1, -1, 1]), np.array([key[1], 99, key[0], 98])
    loss, _ = info_nce(queries, targets, key, ContrastiveConfig(0.1), image_key=image, negative_key=negative)
    scores = np.float64(queries) @ np.float64(targets).T / 0.1
    losses = []
    for q in range(6):
        kept = [q]
        kept += [t for t in range(6) if t != q and key[t] != key[q] and not (image[t] == image[q] >= 0)]
        kept += [6 + n for n in range(4) if negative[n] != key[q]]
        losses.append(np.log(np.exp(scores[q, kept]).sum()) - scores[q, q])
    # float32 scores of up to 10 over ten terms
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    bare, _ = info_nce(queries, targets, key, ContrastiveConfig(0.1))
    assert abs(float(bare) - float(loss)) > 1e-3, "the keys matter here"


@pytest.mark.parametrize("causal", [False, True])
def test_mean_pooling_is_the_mean_over_the_example_whatever_shares_its_row(causal):
    rng = np.random.default_rng(5)
    stub, bridges = Stub(rng.standard_normal((40, 5)).astype(np.float32)), np.arange(1, 7)[:, None]
    for layout in ([[3, 0], [5], [1, 4, 2]], [[0, 1, 2], [3, 4, 5]]):
        batch = rows_of(bridges, layout, 3)
        batch["tokens"][batch["tokens"] == 0] = 39
        words = np.zeros((6, 5))
        for row, members in enumerate(layout):
            for slot, example in enumerate(members):
                columns = np.arange(3 * slot, 3 * slot + 3)
                batch["token_start"][row, columns] = 3 * slot
                batch["token_end"][row, columns] = columns + 1 if causal else 3 * slot + 3
                batch["tokens"][row, columns[0]] = 20 + example  # a word of its own
                words[example] = stub.table[[20 + example, 39, bridges[example, 0]]].mean(axis=0)
        got = embed_examples(stub, batch, "mean")
        np.testing.assert_allclose(got, unit(words), atol=1e-6)  # float32
        assert np.abs(got - embed_examples(stub, batch)).max() > 0.1


# ------------------------------------------------------------------------------------------------- beyond the paper


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), hardness=st.floats(0.1, 20), symmetric=st.booleans())
def test_hard_negatives_weigh_more_and_their_weights_have_the_mean_1(seed, hardness, symmetric):
    queries, targets, key = case(seed, extra=3)
    plain_config = ContrastiveConfig(0.1, symmetric=symmetric)
    config = dataclasses.replace(plain_config, hardness=hardness)
    loss, _ = info_nce(queries, targets, key, config)
    bare, _ = info_nce(queries, targets, key, plain_config)
    # Weight and score rise together, so their mean product is at least the product of their means (Chebyshev).
    assert float(loss) >= float(bare) - 1e-5
    cosines = np.float64(queries) @ np.float64(targets).T
    losses = []
    for q in range(6):
        others = [t for t in range(9) if t != q and (t >= 6 or key[t] != key[q])]
        weights = np.exp(hardness * cosines[q, others])
        weights /= weights.mean()
        total = np.exp(cosines[q, q] / 0.1) + (weights * np.exp(cosines[q, others] / 0.1)).sum()
        losses.append(np.log(total) - cosines[q, q] / 0.1)
    if not symmetric:
        np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4, atol=1e-5)  # float32 scores of up to 30


def test_weights_of_negatives_pass_no_gradient_and_nothing_is_nan_without_negatives():
    queries, targets, _ = case(7, N=4)
    config = ContrastiveConfig(0.1, hardness=5.0, symmetric=True)
    alone, gradient = jax.value_and_grad(lambda q: info_nce(q, targets, np.zeros(4), config)[0])(queries)
    assert abs(alone) < 1e-6 and np.isfinite(gradient).all()
    # Weights that are fixed at this place give the same gradient.
    steep = np.float64(queries) @ np.float64(targets).T * 5
    np.fill_diagonal(steep, -np.inf)
    weights = np.exp(steep) / (np.exp(steep).sum(axis=1, keepdims=True) / 3)
    np.fill_diagonal(weights, 1)

    def fixed(q):
        scores = q @ targets.T / 0.1
        return jnp.mean(jax.nn.logsumexp(scores + np.log(weights), axis=1) - jnp.diagonal(scores))

    one_sided = ContrastiveConfig(0.1, hardness=5.0)
    got = jax.grad(lambda q: info_nce(q, targets, np.arange(4), one_sided)[0])(queries)
    np.testing.assert_allclose(got, jax.grad(fixed)(queries), atol=1e-4)  # float32; gradients are of size 1 to 10


@pytest.mark.parametrize("tokens", ["concatenated", "mean", "max_sim"])
def test_scores_of_several_bridge_tokens(tokens):
    """Against loops over tokens, from states to the loss."""
    rng = np.random.default_rng(0)
    table, K = rng.standard_normal((40, 5)).astype(np.float32), 3
    bridges = rng.permutation(np.arange(1, 40))[: 8 * K].reshape(8, K)
    batch = rows_of(bridges, [[3, 0, 7], [5, 6], [1, 4, 2]], 3) | {"target_key": np.arange(4)}
    config = ContrastiveConfig(0.1, tokens=tokens)
    loss, metrics = contrastive_loss(lambda *_: Stub(table), batch, config)
    states = np.stack([unit(table[bridges[:, k]]) for k in range(K)], axis=1).astype(np.float64)

    def near(a, b):
        if tokens == "max_sim":
            return np.mean([max(x @ y for y in b) for x in a])
        if tokens == "mean":
            a, b = (x.mean(axis=0) / np.linalg.norm(x.mean(axis=0)) for x in (a, b))
            return a @ b
        return np.mean([x @ y for x, y in zip(a, b, strict=True)])

    cosines = np.array([[near(states[q], states[4 + t]) for t in range(4)] for q in range(4)])
    want = np.mean([np.log(np.exp(cosines[q] / 0.1).sum()) - cosines[q, q] / 0.1 for q in range(4)])
    np.testing.assert_allclose(loss, want, rtol=1e-4)  # float32 scores of up to 10
    np.testing.assert_allclose(metrics["positive_cosine"], np.diagonal(cosines).mean(), atol=1e-5)


def test_one_bridge_token_scores_alike_in_every_way():
    rng = np.random.default_rng(1)
    stub, bridges = Stub(rng.standard_normal((40, 5)).astype(np.float32)), np.arange(1, 9)[:, None]
    batch = rows_of(bridges, [[*range(8)]], 8) | {"target_key": np.arange(4)}
    losses = [
        contrastive_loss(lambda *_: stub, batch, ContrastiveConfig(0.1, tokens=tokens))[0]
        for tokens in ("concatenated", "mean", "max_sim")
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@pytest.mark.parametrize("K", [1, 2])
def test_shorter_widths_have_the_loss_of_embeddings_that_are_that_short(K):
    rng = np.random.default_rng(2)
    table = rng.standard_normal((40, 6)).astype(np.float32)
    bridges = np.arange(1, 8 * K + 1).reshape(8, K)
    batch = rows_of(bridges, [[*range(8)]], 8) | {"target_key": np.arange(4)}
    whole, _ = contrastive_loss(lambda *_: Stub(table), batch, ContrastiveConfig(0.1))
    loss, metrics = contrastive_loss(lambda *_: Stub(table), batch, ContrastiveConfig(0.1, widths=(2, 4)))
    cut = [Stub(table[:, :width]) for width in (2, 4)]
    short = [contrastive_loss(lambda *_, stub=stub: stub, batch, ContrastiveConfig(0.1))[0] for stub in cut]
    np.testing.assert_allclose([metrics["contrastive_2"], metrics["contrastive_4"]], short, rtol=1e-5)  # float32
    np.testing.assert_allclose(loss, (whole + sum(short)) / 3, rtol=1e-5)
    with pytest.raises(ValueError, match="width is 7: an embedding has 6 numbers"):
        contrastive_loss(lambda *_: Stub(table), batch, ContrastiveConfig(0.1, widths=(7,)))
