"""Hugging Face folders in and out, on the golden checkpoints of both families."""

import functools
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_jax.checkpoints import hub_layout
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.huggingface import INDEX_FILE, SINGLE_FILE, read_folder, read_leaves, write_folder
from cocoa_jax.models.config import read_config
from cocoa_jax.models.qwen2_vl import abstract_params

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = ("qwen2", "qwen2_5")
PATCH = (3, 2, 4, 4)


def golden_folder(folder: Path, family: str, layout: str = "hub") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(GOLDEN / f"{family}.config.json", folder / "config.json")
    shutil.copyfile(GOLDEN / f"{family}.{layout}.safetensors", folder / SINGLE_FILE)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(safetensors.numpy.load_file(path))
    return found


def rewrite(folder: Path, edit) -> None:
    """Save the folder's weights again after ``edit`` has changed the dict of tensors."""
    values = tensors(folder)
    edit(values)
    safetensors.numpy.save_file(values, folder / SINGLE_FILE)


shapes_of = functools.cache(abstract_params)


def abstract_of(folder: Path, dtype=np.float32):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes_of(read_config(folder)))


def same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path) -> Path:
    return golden_folder(tmp_path / "golden", request.param)


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder, abstract_of(folder))
    return str(caught.value).splitlines()[1:]


def test_kernels_are_transposed_layers_stacked_and_patches_flattened(folder):
    source, read = tensors(folder), read_folder(folder, abstract_of(folder))
    for layer in range(3):
        kernel = read["text"]["layers"]["attention"]["k_proj"]["kernel"][layer]
        np.testing.assert_array_equal(kernel, source[f"model.layers.{layer}.self_attn.k_proj.weight"].T)
        bias = read["vision"]["layers"]["attention"]["qkv"]["bias"][layer]
        np.testing.assert_array_equal(bias, source[f"visual.blocks.{layer}.attn.qkv.bias"])
    np.testing.assert_array_equal(read["vision"]["merger"]["fc2"]["kernel"], source["visual.merger.mlp.2.weight"].T)
    patches = np.random.default_rng(0).standard_normal((5, *PATCH)).astype(np.float32)
    wanted = np.einsum("pcthw,ecthw->pe", patches, source["visual.patch_embed.proj.weight"])
    np.testing.assert_allclose(patches.reshape(5, -1) @ read["vision"]["patch_embed"]["kernel"], wanted, atol=1e-5)


def test_tensors_of_equal_shape_keep_their_names(folder):
    slots = hub_layout.plan(abstract_of(folder), PATCH)
    pairs = {
        "model.layers.2.input_layernorm.weight": "text.layers.input_norm.scale",
        "model.layers.2.post_attention_layernorm.weight": "text.layers.post_norm.scale",
        "model.layers.2.mlp.gate_proj.weight": "text.layers.mlp.gate_proj.kernel",
        "model.layers.2.mlp.up_proj.weight": "text.layers.mlp.up_proj.kernel",
        "model.layers.2.self_attn.v_proj.bias": "text.layers.attention.v_proj.bias",
        "visual.blocks.2.norm1.weight": "vision.layers.norm1.scale",
        "visual.blocks.2.norm2.weight": "vision.layers.norm2.scale",
    }
    assert {key: (slots[key].path, slots[key].layer) for key in pairs} == {
        key: (path, 2) for key, path in pairs.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_both_key_layouts_give_the_same_tree(family, tmp_path):
    hub, newer = (golden_folder(tmp_path / layout, family, layout) for layout in ("hub", "v5"))
    left, right = (flatten_dict(read_folder(folder, abstract_of(folder))) for folder in (hub, newer))
    assert left.keys() == right.keys()
    assert all(same_bytes(left[key], right[key]) for key in left)


def test_every_leaf_and_every_tensor_is_used_once(folder):
    slots = hub_layout.plan(abstract_of(folder), PATCH)
    assert set(slots) == set(tensors(folder))
    places = {(slot.path, slot.layer) for slot in slots.values()}
    assert len(places) == len(slots)
    assert {path for path, _ in places} == set(flatten_dict(abstract_of(folder), sep="."))


def test_written_again_every_tensor_is_the_same_byte_for_byte(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    write_folder(tmp_path / "again", read_folder(folder, abstract_of(folder)), folder)
    source, again = tensors(folder), tensors(tmp_path / "again")
    assert source.keys() == again.keys()
    assert all(same_bytes(source[key], again[key]) for key in source)
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").exists()
    # transformers 4 refuses a file that does not name its format.
    with safetensors.safe_open(tmp_path / "again" / SINGLE_FILE, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
    wide_norms=st.booleans(),
    shard=st.sampled_from([1, 20_000, 10**9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_bits_in_any_dtype_and_sharding(tmp_path_factory, family, dtype, wide_norms, shard, seed):
    base = tmp_path_factory.mktemp("trip")
    source = golden_folder(base / "source", family)
    rng = np.random.default_rng(seed)

    def bits(leaf):
        width = np.float32 if wide_norms and len(leaf.shape) <= 2 else dtype
        return np.frombuffer(rng.bytes(int(np.prod(leaf.shape)) * np.dtype(width).itemsize), width).reshape(leaf.shape)

    params = jax.tree.map(bits, abstract_of(source))
    write_folder(base / "out", params, source, max_shard_size=shard)
    read = read_folder(base / "out", jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
    assert jax.tree.all(jax.tree.map(same_bytes, params, read))


def test_shards_have_an_index_and_stay_below_the_limit(folder, tmp_path):
    write_folder(tmp_path / "out", read_folder(folder, abstract_of(folder)), folder, max_shard_size=80_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(tensors(folder))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(folder).values())
    for name in names:
        held = safetensors.numpy.load_file(tmp_path / "out" / name)
        assert sum(value.nbytes for value in held.values()) <= 80_000
        assert {key for key, place in index["weight_map"].items() if place == name} == set(held)


def test_wider_dtypes_come_first_so_that_every_tensor_is_aligned(folder, tmp_path):
    params = read_folder(folder, abstract_of(folder, ml_dtypes.bfloat16))
    params["vision"]["merger"] = jax.tree.map(lambda leaf: leaf.astype(np.float32), params["vision"]["merger"])
    write_folder(tmp_path / "out", params, folder)
    data = (tmp_path / "out" / SINGLE_FILE).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    places = sorted((entry["data_offsets"][0], entry["dtype"]) for key, entry in header.items() if key[0] != "_")
    assert [dtype for _, dtype in places] == sorted((dtype for _, dtype in places), key=["F32", "BF16"].index)
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_leaves_come_one_at_a_time(folder):
    abstract = flatten_dict(abstract_of(folder), sep=".")
    assert [path for path, _ in read_leaves(folder, abstract_of(folder))] == list(abstract)


def test_casting_names_the_dtype_in_the_config(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "torch_dtype": "float32"}))
    params = read_folder(folder, abstract_of(folder))
    write_folder(tmp_path / "out", params, folder, dtype=ml_dtypes.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for key, value in tensors(tmp_path / "out").items():
        assert same_bytes(value, tensors(folder)[key].astype(ml_dtypes.bfloat16))


def test_all_problems_come_in_one_error(folder):
    def spoil(values):
        del values["model.layers.1.mlp.up_proj.weight"]
        values["visual.merger.mlp.0.bias"] = np.zeros(7, np.float32)
        values["model.layers.3.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
        values["model.language_model.norm.weight"] = np.zeros(64, np.float32)
        values["model.layers.0.input_layernorm.weight"] = np.zeros(64, np.int32)

    rewrite(folder, spoil)
    problems = problems_of(folder)
    assert len(problems) == 5
    text = "\n".join(problems)
    assert "model.layers.1.mlp.up_proj.weight: missing, wanted [96, 64]" in text
    assert "visual.merger.mlp.0.bias: shape [7], wanted [128]" in text
    assert "model.layers.3.mlp.up_proj.weight: unexpected" in text
    assert "model.norm.weight: model.language_model.norm.weight is the same tensor" in text
    assert "model.layers.0.input_layernorm.weight: dtype I32" in text


def test_a_transposed_tensor_is_refused(folder):
    rewrite(folder, lambda values: values.update({"visual.merger.mlp.2.weight": np.zeros((128, 64), np.float32)}))
    assert problems_of(folder) == ["  visual.merger.mlp.2.weight: shape [128, 64], wanted [64, 128]"]


def test_only_the_named_tensors_are_ignored(folder):
    tied = {"lm_head.weight": tensors(folder)["model.embed_tokens.weight"]}
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    expected = read_folder(folder, abstract_of(folder))
    rewrite(folder, lambda values: values.update(tied | rotary))
    read = read_folder(folder, abstract_of(folder))
    assert jax.tree.all(jax.tree.map(same_bytes, expected, read))
    rewrite(folder, lambda values: values.update({"score.weight": np.ones(1, np.float32)}))
    assert problems_of(folder) == ["  score.weight: unexpected, the config has no place for it"]


def test_an_untied_head_is_wanted_and_read(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": False}))
    assert problems_of(folder) == ["  lm_head.weight: missing, wanted [160, 64]"]
    head = np.random.default_rng(0).standard_normal((160, 64)).astype(np.float32)
    rewrite(folder, lambda values: values.update({"lm_head.weight": head}))
    np.testing.assert_array_equal(read_folder(folder, abstract_of(folder))["text"]["head"]["kernel"], head.T)


@pytest.mark.parametrize("length", [0, 4, 3000, -1])
def test_a_truncated_file_is_named(folder, length):
    data = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(data[:length])
    assert f"{SINGLE_FILE}: cannot be read" in problems_of(folder)[0]


def test_index_and_shards_must_agree(folder, tmp_path):
    out = tmp_path / "out"
    write_folder(out, read_folder(folder, abstract_of(folder)), folder, max_shard_size=200_000)
    index = json.loads((out / INDEX_FILE).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.extra.weight"] = shards[0]
    moved = index["weight_map"].pop("model.norm.weight")
    (out / INDEX_FILE).write_text(json.dumps(index))
    text = "\n".join(problems_of(out))
    assert f"model.extra.weight: the index places it in {shards[0]}, which lacks it" in text
    assert f"model.norm.weight: in {moved}, but not in the index" in text
    (out / shards[-1]).unlink()
    assert f"{shards[-1]}: cannot be read" in "\n".join(problems_of(out))
    (out / INDEX_FILE).write_text('{"weight_map": {"a": "../a.safetensors"}}')
    assert "is no plain file name" in "\n".join(problems_of(out))


def test_a_folder_without_weights_or_with_two_sets_is_refused(folder):
    (folder / INDEX_FILE).write_text("{}")
    assert "remove the one that is out of date" in problems_of(folder)[0]
    (folder / INDEX_FILE).unlink()
    (folder / SINGLE_FILE).unlink()
    assert "only safetensors are read" in problems_of(folder)[0]


def test_a_taken_destination_is_refused_and_untouched(folder, tmp_path):
    params = read_folder(folder, abstract_of(folder))
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", params, folder)
    before = (tmp_path / "out" / SINGLE_FILE).read_bytes()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        write_folder(tmp_path / "out", params, folder)
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == before


def test_an_interrupted_write_leaves_nothing(folder, tmp_path):
    params = read_folder(folder, abstract_of(folder))

    class Broken:
        shape, dtype = params["vision"]["merger"]["fc2"]["kernel"].shape, np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise KeyboardInterrupt

    params["vision"]["merger"]["fc2"]["kernel"] = Broken()
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new" / "out", params, folder)
    assert list((tmp_path / "new").iterdir()) == []


def test_too_small_a_disk_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="1,000 bytes free"):
        write_folder(tmp_path / "new" / "out", read_folder(folder, abstract_of(folder)), folder)
    assert list((tmp_path / "new").iterdir()) == []


def test_parameters_of_another_backbone_are_all_named(folder):
    params = read_folder(folder, abstract_of(folder))
    params["text"]["adapter"] = {"kernel": np.zeros((2, 2), np.float32)}
    params["vision"]["patch_embed"]["kernel"] = np.zeros((97, 32), np.float32)
    with pytest.raises(CheckpointError) as caught:
        hub_layout.plan(params, PATCH)
    assert "text.adapter.kernel: 0 rules of the table fit" in str(caught.value)
    assert "97 values per patch, but config.json has (3, 2, 4, 4) = 96" in str(caught.value)
