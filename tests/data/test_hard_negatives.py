"""Hard negatives from MMEB-train's lists to the loss: 0, 1 or 2 of a record, and none that is not there."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoa_jax.data.intake import check
from cocoa_jax.data.mixture import DatasetConfig, MixtureConfig, open_mixture, with_negatives
from cocoa_jax.data.naming import open_named
from cocoa_jax.data.pipeline import BatchConfig, MaskingConfig, RowsConfig, rejected, stage_dataset, step_records
from cocoa_jax.data.prepare import BuildConfig, build
from cocoa_jax.data.readers.records import Columns
from cocoa_jax.data.readers.stores import FolderStore
from cocoa_jax.data.sources import RecordError
from cocoa_jax.data.synthesis.pictures import open_subjects, subject
from cocoa_jax.objectives.contrastive import ContrastiveConfig, contrastive_loss, info_nce

N = 6
ROWS = RowsConfig(batch_size=N, shapes=((8, 64, 64), (16, 64, 64)), examples_per_row=4, masked_per_row=2)


@dataclasses.dataclass(frozen=True)
class Stub:
    """A model whose state is the embedding of the token."""

    table: np.ndarray

    def __call__(self, inputs):
        return jnp.take(jnp.asarray(self.table), inputs.tokens, axis=0)


def opened(root, to_parquet, wrong):
    """A training set of texts whose record i has these wrong targets: a list, or one text, "" for none as published."""
    row = {"qry_image_path": "", "pos_image_path": "", "neg_image_path": ""}
    rows = [row | {"qry": f"red {i}", "pos_text": f"kiwi {i}", "neg_text": text} for i, text in enumerate(wrong)]
    to_parquet(root / "Texts" / "original-00000-of-00001.parquet", rows)
    return open_mixture(MixtureConfig({"Texts": DatasetConfig("mmeb-train")}, str(root)), "contrastive")


def numpy_loss(embed, records, temperature):
    """One query at a time, in float64, over the texts that are there."""
    targets = [embed(record.target) for record in records]
    targets += [embed(content) for record in records for content in record.negatives[:2]]
    losses = []
    for place, record in enumerate(records):
        scores = np.array(targets) @ embed(record.query) / temperature
        losses.append(np.log(np.exp(scores).sum()) - scores[place])
    return np.mean(losses)


LISTS = [[], ["boat 1"], ["boat 2", "joy 2"], [], ["joy 4"], ["boat 5", "joy 5", "never"]]
PUBLISHED = ["", "boat 1", "joy 2", "", "", "boat 5"]


@pytest.mark.parametrize(("wrong", "absent"), [(LISTS, 6), (PUBLISHED, 9), ([""] * N, 12)])
def test_a_record_has_as_many_as_its_list_holds(tmp_path, to_parquet, processors, wrong, absent):
    found, processor = opened(tmp_path, to_parquet, wrong), processors["2"]
    config = BatchConfig("contrastive", ROWS, negatives=2)
    batch = stage_dataset(config, found.sources, found.weights, processor, seed=0, steps=1)[0]
    assert batch["example"].shape == (4 * N,) and batch["negative_key"].shape == (2 * N,)
    np.testing.assert_array_equal(batch["example"][2 * N :] < 0, batch["negative_key"] < 0)
    assert (batch["example"] < 0).sum() == absent
    table = np.random.default_rng(0).standard_normal((384, 9)).astype(np.float32)
    loss, metrics = contrastive_loss(lambda *_: Stub(table), batch, ContrastiveConfig(0.1, pooling="mean"))

    def embed(content):
        states = np.float64(table)[processor.embedding(content).tokens].mean(axis=0)
        return states / np.linalg.norm(states)

    source = found.sources["Texts"]
    named = step_records(config, found.sources, found.weights, processor, seed=0, step=0)
    records = [source.record(int(name.rsplit(" ", 1)[1]), np.random.default_rng(0)) for name in named]
    # float32 scores of up to 10
    np.testing.assert_allclose(loss, numpy_loss(embed, records, 0.1), rtol=1e-5)
    assert all(np.isfinite(value) for value in metrics.values())


def test_as_many_as_are_read_of_a_long_list(tmp_path, to_parquet, processors):
    found = opened(tmp_path, to_parquet, [[f"boat {i} {j}" for j in range(20)] for i in range(N)])
    config = BatchConfig("contrastive", ROWS, negatives=8)
    batch = stage_dataset(config, found.sources, found.weights, processors["2"], seed=0, steps=1)[0]
    assert batch["example"].shape == (10 * N,) and (batch["example"] >= 0).all()
    for number in (9, -1):
        with pytest.raises(ValueError, match=f"negatives is {number}: a record brings 8 wrong targets at most"):
            BatchConfig("contrastive", ROWS, negatives=number)


@pytest.fixture
def some_missing(tmp_path, to_lines, picture):
    """Pairs with pictures for wrong targets, of which record 2 lacks the first, and record 4 the second."""
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    wrong = [["1.jpg", "2.jpg"], ["3.jpg"], ["gone.jpg", "1.jpg"], [], ["2.jpg", "gone.jpg"], ["1.jpg"]]
    rows = [{"q": f"{i % 4}.jpg", "t": f"kiwi {i}", "n": wrong[i]} for i in range(N)]
    to_lines(tmp_path / "rows.jsonl", rows)
    columns = Columns(query_image="q", target_text="t", negative_image="n")
    return MixtureConfig({"mine": DatasetConfig("table", "rows.jsonl", columns=columns)}, str(tmp_path))


@pytest.mark.parametrize(
    ("stage", "negatives", "bad", "reads"),
    [("warmup", 0, [], 6), ("bridge", 0, [], 6), ("contrastive", 0, [], 6), ("contrastive", 1, [2], 11),
     ("contrastive", 2, [2, 4], None)],
)  # fmt: skip
def test_wrong_targets_that_nobody_asks_for_are_not_read(
    some_missing, processors, monkeypatch, stage, negatives, bad, reads
):
    rows = dataclasses.replace(ROWS, masked_per_row=24)
    masking = None if stage == "contrastive" else MaskingConfig(0.5, 0.5)
    config, processor = BatchConfig(stage, rows, masking=masking, negatives=negatives), processors["2"]
    found = open_mixture(some_missing, stage)
    read = []
    plain = FolderStore.read
    monkeypatch.setattr(FolderStore, "read", lambda self, path: read.append(path) or plain(self, path))
    assert [i for _, i, reason in check(config, found.sources, processor, 0) if reason] == bad
    assert reads is None or len(read) == reads
    assert list(rejected(config, found.sources["mine"], processor, 0)) == bad
    made = stage_dataset(config, found.sources, found.weights, processor, seed=0, steps=1)
    if bad:
        with pytest.raises(RecordError, match=r"mine [24]: path 'gone\.jpg': not in"):
            made[0]
    else:
        read.clear()
        assert made[0]["stats"][2] == N * (2 if stage == "contrastive" else 1) and len(read) == N


def test_how_many_are_read_is_no_matter_of_the_data(some_missing, processors, tmp_path):
    (named,) = open_named("mixture", some_missing)
    few = with_negatives(named.source, 1)
    assert few.fingerprint() == named.source.fingerprint() == named.contents
    assert [len(pickle.loads(pickle.dumps(few)).record(i).negatives) for i in (0, 1, 3, 4)] == [1, 1, 0, 1]
    assert vars(few)["settled"] is named.source.settled and with_negatives(few, 8) is few
    assert len(named.source.record(0).negatives) == 2, "the source itself reads on"
    # A build reads all of them, for whatever stage comes.
    made = build("mine", named.source, "x", processors["2"], str(tmp_path / "out"), BuildConfig(workers=0))
    assert [len(made.record(i).negatives) for i in range(len(made))] == [2, 1, 0, 1]
    (asked,) = open_subjects(["mixture"], {"mixture": some_missing})
    assert subject(asked.source, 2).words == "kiwi 2", "nor does a model that is asked for words see them"


def test_blank_wrong_targets_take_no_places(tmp_path, to_lines, processors):
    """A table and what is built of it give the same batches, and beyond the last one asked for nothing is read."""
    wrong = [[" ", "x", "y", "z"], ["", None, "x"], [" ", "\t"], [], "x", ["x", " ", "y", 7]]
    rows = [{"q": f"red {i}", "t": f"kiwi {i}", "n": wrong[i]} for i in range(N)]
    to_lines(tmp_path / "rows.jsonl", rows)
    columns = Columns(query_text="q", target_text="t", negative_text="n")
    config = MixtureConfig({"mine": DatasetConfig("table", "rows.jsonl", columns=columns)}, str(tmp_path))
    (named,) = open_named("mixture", config)
    texts = [[content.text for content in with_negatives(named.source, 2).record(i).negatives] for i in range(N)]
    assert texts == [["x", "y"], ["x"], [], [], ["x"], ["x", "y"]]
    wrong[5].pop()  # which a build would read, and refuse
    to_lines(tmp_path / "rows.jsonl", rows)
    (named,) = open_named("mixture", config)
    made = build("mine", named.source, "x", processors["2"], str(tmp_path / "out"), BuildConfig(workers=0))
    built = MixtureConfig({"mine": DatasetConfig("prepared", made.folder)})
    for negatives in (1, 2, 3):
        batches = []
        for mixture in (config, built):
            found = open_mixture(mixture, "contrastive")
            stage = BatchConfig("contrastive", ROWS, negatives=negatives)
            batches.append(stage_dataset(stage, found.sources, found.weights, processors["2"], seed=0, steps=1)[0])
        table, prepared = batches
        for name in ("tokens", "example"):
            np.testing.assert_array_equal(table[name], prepared[name], err_msg=name)
        # Equal keys mean the same; which number stands for which is another matter.
        np.testing.assert_array_equal(table["negative_key"] < 0, prepared["negative_key"] < 0)


@pytest.mark.parametrize("more", [{"symmetric": True}, {"false_negatives": True}, {"hardness": 2.0}])
def test_what_stands_in_the_place_of_none_is_never_seen(more):
    """Loss, metrics and gradients are those without the place, whatever the settings."""
    config, rng = ContrastiveConfig(0.1, **more), np.random.default_rng(1)
    rows = rng.standard_normal((4 + 4 + 6, 7)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    key, negative = np.array([0, 1, 0, 2]), np.array([-1, 1, 7, -1, 8, -1])
    kept = np.array([*range(8), *(8 + np.flatnonzero(negative >= 0))])

    def loss(rows, negative):
        return info_nce(rows[:4], rows[4:], key, config, negative_key=negative)

    (got, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(rows, negative)
    (want, others), gradients = jax.value_and_grad(loss, has_aux=True)(rows[kept], negative[negative >= 0])
    # The same numbers summed in another order, float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(gradient[kept], gradients, rtol=1e-5, atol=1e-6)
    assert not gradient[8 + np.flatnonzero(negative < 0)].any()
    for name, value in others.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
