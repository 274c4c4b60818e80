"""Weights written with their adapter: the same numbers as merged in memory, a few arrays at a time."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from cocoa_jax.checkpoints import huggingface, merging, stream
from cocoa_jax.checkpoints.added_tokens import add_to_tokenizer, token_ids, wider_tokenizer, with_mean_rows
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.errors import CheckpointError, DamagedCheckpointError
from cocoa_jax.checkpoints.huggingface import SINGLE_FILE, write_folder
from cocoa_jax.checkpoints.merging import merge_checkpoint
from cocoa_jax.checkpoints.orbax import StageCheckpoints, carry_backbone, save_base
from cocoa_jax.checkpoints.peft import export_adapter, load_adapter, save_adapter
from cocoa_jax.config import TrainConfig, parse, to_dict
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.models.config import read_config
from cocoa_jax.models.lora import AdapterRecord, LoraConfig, adapted_graph, merge
from cocoa_jax.models.qwen2_vl import Compute

ROWS = (155, 154)


@pytest.fixture(scope="module")
def source(golden, tmp_path_factory) -> Path:
    """A Hugging Face folder; not to be written to."""
    folder = tmp_path_factory.mktemp("merging") / "source"
    folder.mkdir()
    shutil.copyfile(golden / "qwen2.config.json", folder / "config.json")
    shutil.copyfile(golden / "qwen2.hub.safetensors", folder / SINGLE_FILE)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def random_adapter(folder: Path, seed: int, **settings):
    """A record and an adapter of random numbers for the backbone of a folder."""
    record = AdapterRecord(LoraConfig(rank=3, alpha=6.0, **settings), ROWS)
    _, shapes = adapted_graph(open_backbone(folder).config, Compute(), record.config, ROWS)
    rng = np.random.default_rng(seed)
    return record, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def stage(request, source) -> Path:
    """A stage that trained an adapter on a base of this dtype; not to be written to."""
    folder = source.parent / f"stage-{request.param}"
    record, adapter = random_adapter(source, 1, base_dtype=request.param)
    base = jax.tree.map(lambda leaf: jnp.asarray(leaf, request.param), open_backbone(source).load())
    carry_backbone(source, folder)
    save_base(folder, base)
    metadata = {"stage": "bridge", "config": None, "parent": None, "adapter": record.to_json()}
    with StageCheckpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, params={}, adapter=adapter, head={}, optimizer={}, loop={}, metadata=metadata, wait=True)
    return folder


def assert_same(folder: Path, other: Path) -> None:
    assert (folder / SINGLE_FILE).read_bytes() == (other / SINGLE_FILE).read_bytes()
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", SINGLE_FILE}


def adapted(settings, folder: Path, *, says: bool = True) -> Path:
    """A stage with an adapter; ``says`` what tokens it added, which older ones do not."""
    config = parse(TrainConfig, settings)
    origin = open_backbone(config.checkpoint)
    processor = Processor.load(origin.side_files, origin.config, config.data.processor)
    rows = sorted({processor.mask_id, *processor.bridge_ids}) if config.lora.tokens else ()
    record = AdapterRecord(config.lora, tuple(rows))
    _, shapes = adapted_graph(origin.config, Compute(), record.config, record.rows)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    carry_backbone(origin.side_files, folder, processor.added)
    save_base(folder, with_mean_rows(origin.load(), processor.added.values(), processor.used_rows))
    parent = {**origin.origin(), **({"added": dict(processor.added)} if says else {})}
    metadata = {"stage": "warmup", "config": to_dict(config), "parent": parent, "adapter": record.to_json()}
    with StageCheckpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, params={}, adapter=adapter, head={}, optimizer={}, loop={}, metadata=metadata, wait=True)
    return folder


LORA = {"rank": 2, "targets": [r"text\.layers\.attention\.q_proj"]}


@pytest.fixture(params=[True, False], ids=["rows trained", "rows frozen"])
def masked(request, published, stage_settings, tmp_path) -> Path:
    """A stage 1 with an adapter, from a checkpoint whose tokenizer has no mask token."""
    folder = tmp_path / "1-warmup"
    return adapted(stage_settings("warmup", published, folder, lora={**LORA, "tokens": request.param}), folder)


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("lacks", [True, False])
def test_frozen_rows_are_exported_only_where_the_stage_added_their_tokens(
    published, backbone, stage_settings, tmp_path, lacks, says
):
    start = published if lacks else backbone
    settings = stage_settings("warmup", start, tmp_path / "stage", lora={**LORA, "tokens": False})
    export_adapter(adapted(settings, tmp_path / "stage", says=says), tmp_path / "peft")
    record, adapter = load_adapter(tmp_path / "peft", open_backbone(start).config)
    of_both = sorted(token_ids(tmp_path / "stage" / "backbone", ["<|mask|>", "<|im_end|>"]))
    of_mask = sorted(token_ids(tmp_path / "stage" / "backbone", ["<|mask|>"]))
    assert list(record.rows) == ((of_mask if lacks else []) if says else of_both)
    assert ("embed" in adapter["text"]) == bool(record.rows)
    values = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert values["trainable_token_indices"] == (list(record.rows) or None)


def test_an_exported_adapter_makes_the_stage_of_what_it_began_from_with_the_tokens_that_that_lacks(
    masked, published, tmp_path
):
    merge_checkpoint(masked, tmp_path / "merged")
    export_adapter(masked, tmp_path / "peft")
    merge_checkpoint(published, tmp_path / "again", tmp_path / "peft")
    merged, again = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("merged", "again"))
    assert merged == again
    settings = ProcessorConfig()
    assert Processor.load(published, read_config(published), settings).added
    assert not Processor.load(tmp_path / "again", read_config(published), settings).added


def test_the_tokenizer_that_knows_more_comes_along_and_another_is_refused(published, masked, tmp_path):
    side_files = masked / "backbone"
    assert wider_tokenizer(published, side_files) == wider_tokenizer(side_files, published) == side_files
    assert wider_tokenizer(published, tmp_path) == published and wider_tokenizer(tmp_path, published) == published
    other = shutil.copytree(published, tmp_path / "other")
    add_to_tokenizer(other, {"<|other|>": next(iter(token_ids(side_files, ["<|mask|>"])))})
    with pytest.raises(CheckpointError, match=r"tokenizers of .*backbone and .*other differ, as in \('<\|.*: give the"):
        wider_tokenizer(side_files, other)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_stage_is_written_as_it_is_merged_in_memory(stage, source, tmp_path, dtype):
    merge_checkpoint(stage, tmp_path / "streamed", dtype=dtype)
    write_folder(tmp_path / "whole", open_backbone(stage).load(), source, dtype=dtype)
    assert_same(tmp_path / "streamed", tmp_path / "whole")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "streamed" / SINGLE_FILE).values()}
    assert dtypes == {jnp.dtype(dtype or "float32")}


def test_an_adapter_comes_on_top_of_what_the_checkpoint_has(stage, source, tmp_path):
    record, adapter = random_adapter(source, 2)
    save_adapter(tmp_path / "peft", adapter, record, open_backbone(source).config)
    for name, folder in (("stage", stage), ("source", source)):
        merge_checkpoint(folder, tmp_path / name, tmp_path / "peft")
        whole = merge(open_backbone(folder).load(), adapter, record.config, ROWS)
        write_folder(tmp_path / f"{name}-whole", whole, source)
        assert_same(tmp_path / name, tmp_path / f"{name}-whole")
    plain = load_file(source / SINGLE_FILE)
    merged = load_file(tmp_path / "source" / SINGLE_FILE)
    changed = {key for key in plain if not np.array_equal(plain[key], merged[key])}
    assert len(changed) == 7 * 3 + 3 * 3 + 1  # seven maps of a text layer, three of a vision layer, the embedding


def test_few_arrays_are_alive_at_a_time(stage, source, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    most = 0

    def noted(read):
        def wrapped(self, dtype=None, copy=None):
            nonlocal most
            value = read(self)
            alive.append(weakref.ref(value))
            if sum(one() is not None for one in alive) > 3:
                gc.collect()
            most = max(most, sum(one() is not None for one in alive))
            return value

        return wrapped

    for kind in (stream.StoredLeaf, huggingface.HubLeaf, merging.MergedLeaf):
        monkeypatch.setattr(kind, "__array__", noted(kind.__array__))
    record, adapter = random_adapter(source, 2)
    save_adapter(tmp_path / "peft", adapter, record, open_backbone(source).config)
    for name, folder in (("stage", stage), ("source", source)):
        alive, most = [], 0
        merge_checkpoint(folder, tmp_path / name, tmp_path / "peft")
        assert most <= 3 and len(alive) > 30  # what is read, what it becomes, and the last one, being written


def test_damage_is_never_merged(stage, tmp_path):
    other = Path(shutil.copytree(stage, tmp_path / "stage"))
    path = max((other / "base").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="all checkpoints"):
        merge_checkpoint(other, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_what_is_refused_is_refused_before_any_weight_is_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_read", lambda *arguments: pytest.fail("too late"))
    record, adapter = random_adapter(source, 2)
    save_adapter(tmp_path / "peft", adapter, record, open_backbone(source).config)
    values = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match="not empty"):
        merge_checkpoint(source, tmp_path / "peft", tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**values, "bias": "all"}))
    with pytest.raises(CheckpointError, match="bias is 'all'"):
        merge_checkpoint(source, tmp_path / "out", tmp_path / "peft")
