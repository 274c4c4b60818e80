"""What a step of stage 3 says of its embeddings, against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from cocoa_jax.objectives import contrastive
from cocoa_jax.objectives.contrastive import ContrastiveConfig, contrastive_loss, info_nce


def test_the_hardest_target_is_the_nearest_other_one_that_shows_another_thing():
    rng = np.random.default_rng(7)  # two queries have a nearest target that shows the same thing, or is not there
    rows = rng.standard_normal((2, 9, 4)).astype(np.float32)
    rows[1] += rows[0]  # own targets are near, and some the nearest
    queries, targets = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    key, wrong = np.array([0, 1, 0, 2, 3, 4]), np.array([1, -1, 5])  # the last three targets: one is not there
    _, metrics = info_nce(queries[:6], targets, key, ContrastiveConfig(), negative_key=wrong)
    cosines, keys = queries[:6] @ targets.T, np.concatenate([key, wrong])
    others = [[t for t in range(9) if keys[t] not in (key[q], -1)] for q in range(6)]
    hardest = [cosines[q, others[q]].max() for q in range(6)]
    assert metrics["hardest_cosine"] == pytest.approx(np.mean(hardest), abs=1e-6)  # float32
    assert metrics["batch_accuracy"] == pytest.approx(np.mean(np.diag(cosines) > hardest))


def test_the_length_of_embeddings_is_the_mean_over_those_that_are_there(monkeypatch):
    embeddings, lengths = jnp.eye(6), jnp.arange(1.0, 7.0)
    monkeypatch.setattr(contrastive, "embed_in_chunks", lambda *given: (embeddings, lengths))
    batch = {"target_key": np.arange(2), "negative_key": np.array([2, -1]), "pool": np.zeros((1, 6, 1))}
    batch["example"] = np.array([0, 1, 2, 3, 4, -1])
    _, metrics = contrastive_loss(lambda _: None, batch, ContrastiveConfig())
    assert metrics["embedding_norm"] == 3.0
