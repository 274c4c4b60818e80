"""Stages that train an adapter: what changes, what is kept, and where the next stage, PEFT and the embedder begin."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache

from cocoa_jax import cli
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.merging import merge_checkpoint
from cocoa_jax.checkpoints.orbax import base_folder, load_params, read_metadata
from cocoa_jax.checkpoints.peft import load_adapter
from cocoa_jax.commands import training
from cocoa_jax.config import SettingsError, TrainConfig, parse
from cocoa_jax.data.sources import Content, load_pictures
from cocoa_jax.embedder import Embedder
from cocoa_jax.evaluation import run
from cocoa_jax.evaluation.tasks import Task
from cocoa_jax.models.lora import AdapterRecord, LoraConfig, LoraError, init_adapter
from cocoa_jax.models.qwen2_vl import abstract_params
from cocoa_jax.training import loop, stages
from cocoa_jax.training.loop import Stopped, train
from cocoa_jax.training.mesh import MeshConfig, make_mesh
from cocoa_jax.training.optimizer import OptimizerConfig, make_optimizer
from cocoa_jax.training.stages import stage_program
from cocoa_jax.training.state import abstract_state, first_state
from cocoa_jax.training.step import make_step

STEPS = 6
CLOCK = ("seconds", "tflops_per_second", *(f"{what}_per_second" for what in ("pictures", "examples", "tokens")))
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The same programs run again and again here: keep what was compiled."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def settings_in(backbone, stage_settings):
    def make(folder: Path, **more):
        given = stage_settings("bridge", backbone, folder, lora=LORA)
        return {**given, "loop": {"steps": STEPS, "checkpoint_every": 3}, **more}

    return make


@pytest.fixture(scope="module")
def finished(settings_in, tmp_path_factory):
    """A stage 2 that nobody disturbed."""
    return train(parse(TrainConfig, settings_in(tmp_path_factory.mktemp("finished") / "2-bridge")))


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def same(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_a_stage_keeps_its_adapter_and_the_weights_that_it_began_with(finished, backbone):
    origin = open_backbone(backbone)
    base = load_params(base_folder(finished), abstract_params(origin.config))
    assert same(base, origin.load())
    record, adapter = open_backbone(finished).adapter()
    assert record.config == LoraConfig(**LORA) and len(record.rows) == 2  # the mask and the bridge token
    began = init_adapter(base, record.config, record.rows, seed=3)
    changed = {
        path
        for path, leaf in flatten_dict(adapter, sep=".").items()
        if not np.array_equal(leaf, flatten_dict(began, sep=".")[path])
    }
    assert changed == set(flatten_dict(began, sep="."))
    metadata = read_metadata(finished)
    assert metadata["parent"]["path"] == str(backbone) and metadata["config"]["lora"]["rank"] == 4
    step = finished / "checkpoints" / str(STEPS)
    assert (step / "adapter").is_dir() and not (step / "params").exists()


def test_stopped_in_the_middle_it_continues_bit_for_bit(finished, settings_in, tmp_path, monkeypatch):
    settings = parse(TrainConfig, settings_in(tmp_path / "run"))
    answers = iter([False, False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_stop_requests", lambda: contextlib.nullcontext(lambda step: next(answers)))
        with pytest.raises(Stopped):
            train(settings)
    # What it began with is its own: the folder that it came from may change.
    monkeypatch.setattr(loop.Backbone, "load", None)
    train(settings)
    assert records(tmp_path / "run") == records(finished)
    assert same(open_backbone(tmp_path / "run").adapter()[1], open_backbone(finished).adapter()[1])


def test_the_next_stage_begins_with_the_merged_weights_and_an_adapter_of_its_own(
    finished, stage_settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "make_step", lambda *parts: lambda state, batch: pytest.fail("far enough"))
    settings = stage_settings("contrastive", finished, tmp_path / "run", lora={**LORA, "base_dtype": "bfloat16"})
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        train(parse(TrainConfig, settings))
    sizes = open_backbone(finished).config
    base = load_params(
        base_folder(tmp_path / "run"), jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), abstract_params(sizes))
    )
    whole = open_backbone(finished).load()
    assert same(base, jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # Orbax drops what it has not read yet
def test_damaged_frozen_weights_are_made_again_as_the_message_says(finished, settings_in, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))  # three steps are left to do
    settings = parse(TrainConfig, settings_in(folder))
    step = folder / "base" / "checkpoints" / "0" / "params"
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[::-1])
    remedy = r"\): remove .*run/base, the command that trains makes it again from the checkpoint that it began with"
    for read in (open_backbone(folder).load, lambda: train(settings)):
        with pytest.raises(CheckpointError, match=remedy):
            read()
    shutil.rmtree(folder / "base")
    train(settings)
    assert records(folder) == records(finished)
    assert open_backbone(folder).fingerprint() == open_backbone(finished).fingerprint()


def test_embedder_merged_folder_and_peft_adapter_are_one_model(finished, backbone, tmp_path, capsys):
    items = [{"text": "a kiwi fruit"}, {"text": "two small boats"}]
    rows = Embedder.load(finished).embed(items)
    cli.main(["adapter", "merge", str(finished), str(tmp_path / "merged")])
    cli.main(["adapter", "export", str(finished), str(tmp_path / "peft")])
    cli.main(["adapter", "merge", str(backbone), str(tmp_path / "again"), "--adapter", str(tmp_path / "peft")])
    settings = Embedder.load(finished).settings
    for folder in ("merged", "again"):
        # Merged by the same arithmetic; the files hold float32.
        np.testing.assert_array_equal(Embedder.load(tmp_path / folder, settings).embed(items), rows)
    assert np.abs(Embedder.load(backbone, settings).embed(items) - rows).max() > 1e-3
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(backbone) and config["r"] == 4
    record, adapter = load_adapter(tmp_path / "peft", open_backbone(backbone).config)
    assert same(adapter, open_backbone(finished).adapter()[1]) and record.rows == tuple(
        config["trainable_token_indices"]
    )
    before = open_backbone(finished).fingerprint()
    assert before != open_backbone(backbone).fingerprint() and before == open_backbone(finished).fingerprint()
    for command, words in (
        (["export", str(backbone), str(tmp_path / "no")], "trained no adapter"),
        (["export", str(finished), str(tmp_path / "peft")], "not empty"),
        (["merge", str(finished), str(tmp_path / "merged")], "not empty"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["adapter", *command])
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and words in told, told


def test_a_stage_that_trained_an_adapter_is_evaluated_as_its_merged_weights_are(
    finished, backbone, tmp_path, monkeypatch, capsys
):
    emoji = tuple(Content(images=(picture.image,)) for picture in load_pictures("test_unseen")[:6])
    texts = tuple(Content(text) for text in ("kiwi", "car", "hill", "boat", "skin", "face"))
    task = Task("few", "retrieval", "test_unseen", texts, emoji, tuple(frozenset([n]) for n in range(6)))
    monkeypatch.setattr(run, "picture_tasks", lambda split: [task])
    merge_checkpoint(finished, tmp_path / "merged")
    command = ["evaluate", "--splits", "test_unseen", "--output"]
    cli.main([*command, str(tmp_path / "lora"), "--checkpoint", str(finished)])
    assert capsys.readouterr().out.startswith("task")
    settings = Embedder.load(finished).settings
    merged = run.evaluate(tmp_path / "merged", tmp_path / "plain", ["test_unseen"], backbone, settings)
    lora = run.read_results(tmp_path / "lora")
    assert lora["tasks"] == merged.results["tasks"] and lora["config"]["untrained"] == str(backbone)
    (queries, _), (before, _) = merged.embeddings["few"], run.embed_tasks(Embedder(backbone, settings), [task])["few"]
    np.testing.assert_array_equal(np.load(tmp_path / "lora" / "embeddings.npz")["few/queries"], queries)
    assert np.abs(queries - before).max() > 1e-3  # the adapter has learnt something


def test_a_stage_that_trains_everything_has_no_adapter(trained):
    with pytest.raises(CheckpointError, match="trained no adapter"):
        open_backbone(trained).adapter()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"targets": ["text.nowhere"]}, "'text.nowhere' fits no map"),
        ({"ranks": 2}, "ranks"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_is_made(settings_in, tmp_path, lora, words):
    with pytest.raises((SettingsError, LoraError), match=words):
        train(parse(TrainConfig, settings_in(tmp_path / "run", lora=lora)))
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_asked_for_on_the_command_line(settings_in, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "train", asked.append)
    values = settings_in(tmp_path / "run")
    del values["lora"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    cli.main(["train", "--config", str(tmp_path / "run.yaml")])
    cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--lora.rank=16", "--lora.dora=false"])
    cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--lora={}"])
    assert [config.lora for config in asked] == [None, LoraConfig(rank=16, dora=False), LoraConfig()]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "lora": LORA}))
    cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--lora=null"])
    assert asked[-1].lora is None


# -------------------------------------------------------------------------------------------------- the state of a step


@pytest.fixture(scope="module")
def step_of(backbone, settings_in, tmp_path_factory):
    """A program, its wanted and first state, and its optimizer, for these settings of the adapter."""

    def make(**lora):
        config = parse(TrainConfig, settings_in(tmp_path_factory.mktemp("state") / "run", lora={**LORA, **lora}))
        origin = open_backbone(backbone)
        program = stage_program(config, origin.config, (383, 382, 383))
        optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), STEPS)
        wanted = abstract_state(program.shapes, optimizer, make_mesh(MeshConfig()))
        params = origin.load(wanted.params["backbone"])
        return program, optimizer, wanted, first_state(program.first_params(params), optimizer, wanted)

    return make


def test_only_the_adapter_has_optimizer_state(step_of):
    program, _, wanted, state = step_of(base_dtype="bfloat16")
    assert program.adapter == AdapterRecord(LoraConfig(**LORA, base_dtype="bfloat16"), (382, 383))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(program.shapes["adapter"]))
    moments = [leaf for leaf in jax.tree.leaves(wanted.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * numbers
    assert numbers < 0.25 * sum(leaf.size for leaf in jax.tree.leaves(program.shapes["backbone"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params["backbone"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves([state.params["adapter"], moments])} == {jnp.dtype("float32")}


def test_a_frozen_backbone_passes_through_in_its_own_memory():
    kernel, a = np.ones((1, 64, 64), np.float32), np.ones((1, 64, 2), np.float32)
    trees = {"backbone": {"kernel": kernel}, "adapter": {"a": a}}
    params = {name: {"layers": {"attention": {"q_proj": tree}}} for name, tree in trees.items()} | {"head": {}}
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", warmup_steps=0), STEPS)
    wanted = abstract_state(jax.eval_shape(lambda: params), optimizer, make_mesh(MeshConfig()))

    def loss(params, batch, progress):
        part = jax.tree.leaves(params["backbone"])[0] @ jax.tree.leaves(params["adapter"])[0]
        return jnp.sum(part), {"step": batch["step"]}

    step = make_step(loss, optimizer, wanted, STEPS)
    state, _ = step(first_state(params, optimizer, wanted), {})  # now all of it is memory of its own
    (frozen,) = jax.tree.leaves(state.params["backbone"])
    place = frozen.unsafe_buffer_pointer()
    state, metrics = step(state, {})
    assert frozen.is_deleted() and metrics["step"] == 1
    (frozen,) = jax.tree.leaves(state.params["backbone"])
    assert frozen.unsafe_buffer_pointer() == place
    assert np.array_equal(frozen, kernel) and (np.asarray(jax.tree.leaves(state.params["adapter"])[0]) != a).all()


def test_dropout_depends_on_seed_and_step_alone(step_of, monkeypatch):
    program, _, _, state = step_of(dropout=0.5)
    asked = []
    monkeypatch.setattr(
        stages, "join", lambda base, adapter, norms, key, chunk: asked.append(jax.random.key_data(key).tolist())
    )
    monkeypatch.setattr(stages, "bind", lambda graph, params: params)
    monkeypatch.setattr(stages, "bridge_loss", lambda model, batch, chunk_tokens: (0.0, {}))
    for step in (3, 3, 4):
        program.loss(state.params, {"step": jnp.int32(step)}, 0.0)
    assert asked[0] == asked[1] != asked[2]
