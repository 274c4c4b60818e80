"""The probe: nothing but the bridge tells B about A, attention sums to one, geometry by hand, the command."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax import cli
from cocoa_jax.attention import spans
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.data.masking import Purpose, example_rng
from cocoa_jax.data.pairs import picture_source
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.sources import Content, Record, load_pictures
from cocoa_jax.embedder import default_settings
from cocoa_jax.evaluation import probe as probing
from cocoa_jax.evaluation import rebuilding
from cocoa_jax.evaluation.geometry import alignment, effective_rank, uniformity
from cocoa_jax.evaluation.probe import compared, is_shifted
from cocoa_jax.evaluation.rebuilding import Rebuilt, looker, partners, rebuild
from cocoa_jax.evaluation.sets import code_version
from cocoa_jax.models.qwen2_vl import bind, graph_of


@pytest.fixture(scope="module")
def parts(trained):
    """Processor, weights and settings of the tiny model, and twelve records to rebuild."""
    backbone, settings = open_backbone(trained), default_settings(trained)
    processor = Processor.load(backbone.side_files, backbone.config, settings.processor)
    source = picture_source("bridge", load_pictures("test_unseen")[::60][:12])
    records = [source.record(i, example_rng(0, 0, i, Purpose.RECORD)) for i in range(12)]
    return processor, backbone.load(), settings, records, looker(backbone.config, settings.compute)


def run(parts, records, others) -> Rebuilt:
    processor, params, settings, _, look = parts
    return rebuild(records, others, processor, params, settings.rows, settings.visibility, look, True)


def test_every_word_is_hidden_and_counted_once(parts):
    processor, _, _, records, _ = parts
    found = run(parts, records, range(12))
    counts = np.bincount(found.example, minlength=12)
    assert counts.tolist() == [min(16, processor.count(record.target.text)) for record in records]
    assert found.first.sum() == 12 and np.isfinite(found.bits).all()
    # A model that was never trained knows nothing: log2 of the vocabulary, give or take a bit of its random head.
    assert found.bits.mean() == pytest.approx(np.log2(384), abs=1.5)


def test_true_words_are_no_input_of_the_model(parts):
    processor, _, settings, records, _ = parts
    batches = []
    for words in ("zx", "qj"):
        example = processor.bridge(records[0].query, Content(words))
        ((batch, owner, _),) = rebuilding._batches({0: example}, processor, settings.rows, settings.visibility, True)
        assert (owner == 0).sum() == 2
        batches.append(batch)
    for name in batches[0].keys() - {"predict_id"}:
        np.testing.assert_array_equal(batches[0][name], batches[1][name], err_msg=name)
    assert (batches[0]["predict_id"] != batches[1]["predict_id"]).any()


def test_another_bridge_moves_what_is_predicted(parts):
    records = parts[3]
    own = run(parts, records, range(12))
    moved = run(parts, records, partners(records, 0))
    assert np.abs(own.bits - moved.bits).max() > 1e-4


def test_words_are_asked_for_where_the_stage_was_trained_to_say_them(
    backbone, parts, stage_settings, leave_stage, tmp_path, monkeypatch
):
    assert is_shifted(backbone)
    settings = stage_settings("warmup", backbone, tmp_path / "1")
    settings["data"]["masking"]["shift"] = False
    plain = leave_stage(settings)  # a plain masked language model
    assert not is_shifted(plain)
    assert is_shifted(leave_stage(stage_settings("bridge", plain, tmp_path / "2")))
    last = leave_stage(stage_settings("contrastive", plain, tmp_path / "3"))
    assert not is_shifted(last)  # it hides nothing itself
    shifted = []
    monkeypatch.setattr(probing, "rebuild", lambda *given: shifted.append(given[7]) or rebuild(*given))
    found = probing._rebuilding(plain, parts[2], parts[3], 0, lambda count: None)
    assert shifted == [False, False] and not found["shifted"]
    shutil.rmtree(plain)
    assert is_shifted(last)  # nobody knows any more


def test_attention_is_shared_out_and_words_see_no_block_a(parts):
    mass = run(parts, parts[3], range(12)).mass
    assert mass.shape == (2, 3, 3)
    np.testing.assert_allclose(mass.sum(axis=-1), 1, atol=1e-5)  # of weights that sum to one in float32
    assert (mass[:, 2, 0] == 0).all() and (mass[:, 0, 2] == 0).all()  # truncated at the bridge
    assert (mass[:, 2, 1] > 0.01).all() and (mass[:, 1] > 0.01).all()


def test_weights_are_those_that_attention_uses(trained):
    """Weights times values through the output map are what the layer itself gives."""
    backbone = open_backbone(trained)
    graph, _ = graph_of(backbone.config)
    text = bind(graph, backbone.load()).text
    layer_graph, params = nnx.split(text.layers)
    attention = nnx.merge(layer_graph, jax.tree.map(lambda leaf: leaf[1], params)).attention
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 7, 32)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(7)[None, :, None], (2, 7, 3))
    seen = jax.tree.map(lambda part: jnp.asarray(np.stack([part, part])), spans.causal(spans.segments([4, 2], 7)))
    rotation = text.rotation(positions)
    weights = attention.weights(x, rotation, seen)
    values = attention.v_proj(x).reshape(2, 7, -1, attention.head_width)
    values = jnp.repeat(values, weights.shape[1] // values.shape[2], axis=2)
    want = attention.o_proj(jnp.einsum("BNTS,BSNH->BTNH", weights, values).reshape(2, 7, -1))
    np.testing.assert_allclose(attention(x, rotation, seen), want, atol=1e-5)  # float32
    sums = np.asarray(weights.sum(axis=-1))
    np.testing.assert_allclose(sums[..., :6], 1, atol=1e-6)
    assert (sums[..., 6] == 0).all()  # padding


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(0, 5))
def test_partners_show_something_else_and_each_is_taken_once(keys, seed):
    records = [Record(f"{i}", "d", Content("q"), Content("t"), f"{key}") for i, key in enumerate(keys)]
    if 2 * max(keys.count(key) for key in keys) > len(keys):
        with pytest.raises(ValueError, match="show the same"):
            partners(records, seed)
        return
    found = partners(records, seed)
    assert sorted(found) == list(range(len(keys)))
    assert all(keys[i] != keys[j] for i, j in enumerate(found))


def test_bits_by_hand():
    own = Rebuilt(np.array([0, 0, 1]), np.array([1, 0, 1], bool), np.array([1.0, 2, 3]), np.array([1, 0, 0], bool),
                  np.full((2, 3, 3), 1 / 3))  # fmt: skip
    other = dataclasses.replace(own, bits=np.array([2.0, 4, 4]), right=np.zeros(3, bool))
    found = compared(own, other, 2)
    assert found["bits_of_an_example"] == pytest.approx((3 + 1) / 2)
    assert (found["accuracy"], found["shuffled_accuracy"]) == (pytest.approx(1 / 3), 0)
    assert (found["first_accuracy"], found["tokens"]) == (0.5, 3)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_effective_rank_of_what_is_known():
    assert effective_rank(np.ones((9, 5))) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.eye(6)) == pytest.approx(6, abs=1e-9)
    assert effective_rank(np.diag([3.0, 1])) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


def test_uniformity_against_a_loop():
    rows = unit(np.random.default_rng(0).standard_normal((600, 7)))
    near = [np.exp(-2 * np.square(rows - row).sum(axis=1)) for row in rows]
    expected = np.log((np.sum(near) - 600) / (600 * 599))
    assert uniformity(rows) == pytest.approx(expected, abs=1e-9)
    assert uniformity(np.tile(rows[:1], (5, 1))) == pytest.approx(0, abs=1e-9)
    assert alignment(rows[:2], rows[:2]) == 0 and alignment(rows[:1], -rows[:1]) == pytest.approx(4)


def test_the_command_writes_figures_and_a_plot(backbone, trained, tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "probe"), "--examples", "10"]
    cli.main(["probe", "--checkpoints", f"{backbone},{trained}", "--names", "before,3-contrastive", *arguments])
    said, bar = capsys.readouterr()
    assert "before" in said and "3-contrastive" in said
    assert "3-contrastive: 100%" in bar and " 80/80 " in bar  # all of both, twice rebuilt and two sides
    found = json.loads((tmp_path / "probe" / "probe.json").read_text())
    one, two = found["stages"]["before"], found["stages"]["3-contrastive"]
    assert [stage.pop("weights") for stage in (one, two)] == [
        open_backbone(f).fingerprint() for f in (backbone, trained)
    ]
    assert one == two and one["shifted"]  # the same weights
    assert found["config"]["code"] == code_version()
    assert found["config"]["examples"] == 10 and len(one["attention"]["words_to_bridge"]) == 2
    assert 1 <= one["embeddings"]["effective_rank"] <= 20
    assert (tmp_path / "probe" / "probe.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("names", ["one", "a,a", "a,", "a,b,c"])
def test_names_are_one_for_each_checkpoint(backbone, tmp_path, capsys, names):
    command = ["probe", "--checkpoints", f"{backbone},{backbone}", "--output", str(tmp_path / "new"), "--names", names]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 1 and not (tmp_path / "new").exists()
    assert capsys.readouterr().err == (
        f"cocoa: names are {names.split(',')} for 2 checkpoints: give each one of its own\n"
    )


def test_checkpoints_are_called_by_their_folders_and_by_their_paths_where_those_are_alike():
    assert list(probing._named(["a/1", "b/2"], None)) == ["1", "2"]
    assert list(probing._named(["a/1", "b/1"], None)) == ["a/1", "b/1"]
