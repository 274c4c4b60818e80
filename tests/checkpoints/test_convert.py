"""Conversions: bijective, byte for byte, whole or not at all, and read by transformers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import convert_worker

from cocoa_jax import cli
from cocoa_jax.checkpoints import contents, convert, sharded, stream
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.contents import checksum_of, checksums
from cocoa_jax.checkpoints.convert import byte_count, hf_to_orbax, orbax_to_hf
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.hub_layout import plan
from cocoa_jax.checkpoints.huggingface import INDEX_FILE, SINGLE_FILE, read_leaves, write_folder
from cocoa_jax.checkpoints.orbax import steps_folder
from cocoa_jax.embedder import Embedder
from cocoa_jax.evaluation.run import first_ancestor
from cocoa_jax.models.config import ConfigError, parse_config, read_config
from cocoa_jax.models.qwen2_vl import abstract_params

# Orbax drops what it has not read yet when one item of a checkpoint turns out to be damaged.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
WORKER = Path(convert_worker.__file__)
GOLDEN = WORKER.parent.parent / "golden"
FAMILIES = ("qwen2", "qwen2_5")


def golden_folder(folder: Path, family: str = "qwen2", layout: str = "hub") -> Path:
    folder.mkdir(parents=True)
    shutil.copyfile(GOLDEN / f"{family}.config.json", folder / "config.json")
    shutil.copyfile(GOLDEN / f"{family}.{layout}.safetensors", folder / SINGLE_FILE)
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(safetensors.numpy.load_file(path))
    return found


def rewrite(folder: Path, edit) -> None:
    values = tensors(folder)
    edit(values)
    safetensors.numpy.save_file(values, folder / SINGLE_FILE)


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype and left[key].shape == right[key].shape, key
        assert left[key].tobytes() == right[key].tobytes(), key


def process(action: str, *arguments: object, devices: int = 1) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(WORKER), action, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(action: str, *arguments: object, devices: int = 1) -> str:
    worker = process(action, *arguments, devices=devices)
    said, errors = worker.communicate(timeout=300)
    assert worker.returncode == 0, errors
    return said


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder; not to be written to."""
    return golden_folder(tmp_path_factory.mktemp("convert") / "source")


@pytest.fixture(scope="module")
def stage(source) -> Path:
    """The same as a stage; not to be written to."""
    hf_to_orbax(source, source.parent / "stage")
    return source.parent / "stage"


# ------------------------------------------------------------------------------------------------ byte for byte


@pytest.mark.parametrize("layout", ["hub", "v5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_hub_layout_byte_for_byte(family, layout, tmp_path):
    folder = golden_folder(tmp_path / "source", family, layout)
    hf_to_orbax(folder, tmp_path / "stage")
    orbax_to_hf(tmp_path / "stage", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), safetensors.numpy.load_file(GOLDEN / f"{family}.hub.safetensors"))
    carried = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == carried
    assert {path.name for path in (tmp_path / "stage" / "backbone").iterdir()} == carried - {SINGLE_FILE}
    for name in carried - {SINGLE_FILE}:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


HEADS = st.sampled_from([(2, 1), (2, 2), (4, 2)])


@st.composite
def configs(draw) -> dict:
    """A tiny config of either family, flat or nested, tied or not."""
    family = draw(st.sampled_from(FAMILIES))
    values = json.loads((GOLDEN / f"{family}.config.json").read_text())
    heads, kv_heads = draw(HEADS)
    width = heads * 16
    text = values.get("text_config", values)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    text |= {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    text |= {"vocab_size": draw(st.integers(161, 200)), "num_hidden_layers": draw(st.integers(1, 3))}
    text |= {"intermediate_size": draw(st.integers(1, 40)), "rope_parameters": rope}
    vision = values["vision_config"]
    vision["depth"] = draw(st.integers(1, 3))
    vision["hidden_size" if family == "qwen2" else "out_hidden_size"] = width
    if family == "qwen2_5":
        vision["fullatt_block_indexes"] = [0]
    return values | {"tie_word_embeddings": draw(st.booleans())}


@settings(max_examples=5, deadline=None)
@given(
    config=configs(),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
    wide_norms=st.booleans(),
    shard=st.sampled_from([1, 20_000, 10**9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bits_of_any_config_come_back(tmp_path_factory, config, dtype, wide_norms, shard, seed):
    base = tmp_path_factory.mktemp("trip")
    (base / "side").mkdir()
    (base / "side" / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)

    def bits(leaf):
        width = np.float32 if wide_norms and len(leaf.shape) <= 2 else dtype
        return np.frombuffer(rng.bytes(int(np.prod(leaf.shape)) * np.dtype(width).itemsize), width).reshape(leaf.shape)

    abstract = abstract_params(parse_config(config))
    params = jax.tree.map(bits, abstract)
    write_folder(base / "source", params, base / "side", max_shard_size=shard)
    slots = plan(abstract, (3, 2, 4, 4))
    assert set(slots) == set(tensors(base / "source"))
    assert ("lm_head.weight" in slots) != config["tie_word_embeddings"]
    hf_to_orbax(base / "source", base / "stage")
    stored = flatten_dict(stream.stored_params(steps_folder(base / "stage") / "0", abstract), sep=".")
    for path, leaf in flatten_dict(params, sep=".").items():
        assert np.asarray(stored[path]).tobytes() == leaf.tobytes() and stored[path].dtype == leaf.dtype
    orbax_to_hf(base / "stage", base / "back", max_shard_size=shard)
    for path in (base / "source").iterdir():
        assert path.read_bytes() == (base / "back" / path.name).read_bytes(), path.name
    assert len(list((base / "back").iterdir())) == len(list((base / "source").iterdir()))


def test_casting_and_sharding(stage, source, tmp_path):
    orbax_to_hf(stage, tmp_path / "out", dtype="bfloat16", max_shard_size=100_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2 and (tmp_path / "out" / INDEX_FILE).exists()
    assert_same(tensors(tmp_path / "out"), {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors(source).items()})
    assert read_config(tmp_path / "out") == read_config(source)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_transformers_loads_what_comes_out_and_sees_the_same(family, tied, tmp_path):
    import torch
    import transformers

    kinds = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
    model_class = getattr(transformers, f"{kinds[family]}ForConditionalGeneration")
    name = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2_5"}[family]
    config = model_class.config_class.from_pretrained(GOLDEN / f"{name}.config.json")
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    model = model_class(config).eval()
    model.save_pretrained(tmp_path / "source")
    hf_to_orbax(tmp_path / "source", tmp_path / "stage")
    orbax_to_hf(tmp_path / "stage", tmp_path / "back", max_shard_size=150_000)
    loaded, report = model_class.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert {key: list(value) for key, value in report.items() if value} == {}
    theirs, ours = model.state_dict(), loaded.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        left, right = (m(input_ids=tokens).logits for m in (model, loaded.eval()))
    assert torch.equal(left, right)


# ------------------------------------------------------------------------------------------ used like a stage


def test_a_converted_folder_is_a_stage(backbone, tmp_path):
    hf_to_orbax(backbone, tmp_path / "stage")
    converted, origin = open_backbone(tmp_path / "stage"), open_backbone(backbone)
    assert converted.trained and converted.config == origin.config
    jax.tree.map(np.testing.assert_array_equal, converted.load(), origin.load())
    who = {"stage": "converted", "step": 0, "fingerprint": converted.fingerprint(), "parent": None}
    assert converted.origin() == {"path": str(tmp_path / "stage"), **who}
    assert len(converted.fingerprint()) == 8
    assert first_ancestor(tmp_path / "stage") == tmp_path / "stage"
    items = [{"text": "a kiwi"}]
    left, right = (Embedder.load(folder).embed(items) for folder in (backbone, tmp_path / "stage"))
    np.testing.assert_array_equal(left, right)
    # Whoever has Orbax but not this package reads it too.
    plain = ocp.load(tmp_path / "stage" / "checkpoints" / "0", checkpointable_name="params")
    np.testing.assert_array_equal(plain["text"]["norm"]["scale"], origin.load()["text"]["norm"]["scale"])


def test_training_starts_from_a_converted_folder(backbone, stage_settings, tmp_path):
    from cocoa_jax.config import TrainConfig, parse
    from cocoa_jax.training.loop import train

    hf_to_orbax(backbone, tmp_path / "stage")
    settings_ = stage_settings("bridge", tmp_path / "stage", tmp_path / "run")
    settings_["loop"] = {"steps": 1, "checkpoint_every": 1}
    settings_["optimizer"] = {"learning_rate": 1e-3, "warmup_steps": 0}
    train(parse(TrainConfig, settings_))
    orbax_to_hf(tmp_path / "run", tmp_path / "out")
    before, after = tensors(backbone), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert any(before[key].tobytes() != after[key].tobytes() for key in before)


def test_a_trained_stage_is_exported(trained, backbone, tmp_path):
    orbax_to_hf(trained, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(backbone))
    assert (tmp_path / "out" / "tokenizer.json").exists()


# ------------------------------------------------------------------------------------------------ on a mesh


@pytest.mark.parametrize("kind", ["source", "stage"])
def test_onto_eight_devices(kind, request):
    run("on-mesh", request.getfixturevalue(kind), devices=8)


def test_a_host_reads_its_part_of_every_tensor_and_nothing_else(source, tmp_path, monkeypatch):
    """Every value of the file that this host's index does not name is poisoned; rows that it reads are counted."""
    folder = tmp_path / "poisoned"
    shutil.copytree(source, folder)
    abstract = abstract_params(read_config(source))
    expected = dict(read_leaves(source, abstract))["text.layers.mlp.gate_proj.kernel"]
    layers, inputs, outputs = expected.shape
    index = (slice(0, layers), slice(inputs // 2, inputs), slice(0, outputs // 4))
    names = [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in range(layers)]

    def poison(values):
        for key, value in values.items():
            spoilt = np.full_like(value, np.nan)
            if key in names:
                spoilt[index[2], index[1]] = value[index[2], index[1]]
            values[key] = spoilt

    rewrite(folder, poison)
    header = json.loads(
        (data := (folder / SINGLE_FILE).read_bytes())[8 : (first := 8 + int.from_bytes(data[:8], "little"))]
    )
    read: list[tuple[int, int]] = []

    class Recorded:
        """A file of which every range that is asked for is noted, in bytes from its beginning."""

        def __init__(self, file):
            self._file = file

        def get_slice(self, name):
            begin, (rows, columns) = header[name]["data_offsets"][0] + first, header[name]["shape"]
            inner = self._file.get_slice(name)

            class Part:
                def __getitem__(self, wanted):
                    row, column = (one.indices(size)[:2] for one, size in zip(wanted, (rows, columns), strict=True))
                    for number in range(*row):
                        read.append(tuple(begin + 4 * (number * columns + at) for at in column))
                    return inner[wanted]

            return Part()

    with safetensors.safe_open(folder / SINGLE_FILE, framework="np") as file:
        slots = {
            slot.layer: (Recorded(file), key, slot)
            for key, slot in plan(abstract, (3, 2, 4, 4)).items()
            if key in names
        }
        part = sharded.read_part(slots, index, np.float32)
    np.testing.assert_array_equal(part, expected[index])
    wanted = []
    for name in names:
        begin = header[name]["data_offsets"][0] + first
        for row in range(outputs // 4):
            wanted.append((begin + 4 * (row * inputs + inputs // 2), begin + 4 * (row + 1) * inputs))
    assert sorted(read) == sorted(wanted)
    assert sum(end - start for start, end in read) == expected.nbytes // 8


def test_layers_are_cut_too(source):
    abstract = abstract_params(read_config(source))
    expected = dict(read_leaves(source, abstract))["text.layers.mlp.up_proj.kernel"]
    with safetensors.safe_open(source / SINGLE_FILE, framework="np") as file:
        slots = plan(abstract, (3, 2, 4, 4)).items()
        of_layers = {
            slot.layer: (file, key, slot) for key, slot in slots if slot.path.endswith("text.layers.mlp.up_proj.kernel")
        }
        index = (slice(1, 3), slice(0, 64), slice(5, 9))
        np.testing.assert_array_equal(sharded.read_part(of_layers, index, np.float32), expected[index])


def test_patches_are_cut_along_both_axes(source):
    abstract = abstract_params(read_config(source))
    expected = dict(read_leaves(source, abstract))["vision.patch_embed.kernel"]
    with safetensors.safe_open(source / SINGLE_FILE, framework="np") as file:
        slot = plan(abstract, (3, 2, 4, 4))["visual.patch_embed.proj.weight"]
        index = (slice(10, 40), slice(3, 9))
        part = sharded.read_part({None: (file, "visual.patch_embed.proj.weight", slot)}, index, np.float32)
    np.testing.assert_array_equal(part, expected[index])


# ---------------------------------------------------------------------------------------------- bad input


def refused(source: Path, destination: Path, way=hf_to_orbax) -> str:
    """The error; nothing stays behind."""
    with pytest.raises(CheckpointError) as caught:
        way(source, destination)
    assert not destination.exists() and not list(destination.parent.glob(".*partial"))
    return str(caught.value)


def test_all_problems_of_a_source_come_in_one_error(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "bad"))

    def spoil(values):
        del values["model.layers.1.mlp.up_proj.weight"]
        values["visual.merger.mlp.0.bias"] = np.zeros(7, np.float32)
        values["model.layers.3.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
        values["model.layers.0.input_layernorm.weight"] = np.zeros(64, np.int32)

    rewrite(folder, spoil)
    lines = refused(folder, tmp_path / "out").splitlines()
    assert len(lines) == 5 and "(4 problems)" in lines[0]
    for words in (
        "up_proj.weight: missing",
        "shape [7], wanted [128]",
        "layers.3.mlp.up_proj.weight: unex",
        "dtype I32",
    ):
        assert any(words in line for line in lines), words


def test_layers_of_different_dtypes_cannot_be_kept(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "bad"))
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda values: values.update({key: values[key].astype(np.float16)}))
    assert "text.layers.mlp.up_proj.kernel: its layers are {'F32': 2, 'F16': 1}" in refused(folder, tmp_path / "out")


def test_a_tied_head_must_be_the_embedding(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "bad"))
    table = tensors(source)["model.embed_tokens.weight"]
    rewrite(folder, lambda values: values.update({"lm_head.weight": table}))
    hf_to_orbax(folder, tmp_path / "good")
    other = table.copy()
    other[-1, -1] += 1
    rewrite(folder, lambda values: values.update({"lm_head.weight": other}))
    assert "lm_head.weight: differs from model.embed_tokens.weight" in refused(folder, tmp_path / "out")


@pytest.mark.parametrize("length", [0, 4, 3000, -1])
def test_a_truncated_file_is_named(source, tmp_path, length):
    folder = Path(shutil.copytree(source, tmp_path / "bad"))
    (folder / SINGLE_FILE).write_bytes((source / SINGLE_FILE).read_bytes()[:length])
    assert f"{SINGLE_FILE}: cannot be read" in refused(folder, tmp_path / "out")


def test_another_architecture_is_refused(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "bad"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        hf_to_orbax(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_wrong_way_is_refused(source, stage, tmp_path):
    adapted = Path(shutil.copytree(stage, tmp_path / "adapted"))
    (adapted / "base").mkdir()
    assert "trained an adapter: cocoa adapter merge" in refused(adapted, tmp_path / "out", orbax_to_hf)
    assert "is a stage already" in refused(stage, tmp_path / "out")
    assert "is a Hugging Face folder already" in refused(source, tmp_path / "out", orbax_to_hf)
    assert "is not a folder" in refused(tmp_path / "nowhere", tmp_path / "out", orbax_to_hf)


def test_the_folder_one_is_in_and_one_below_a_file_are_refused(source, tmp_path, monkeypatch):
    """A folder that a shell stands in would be renamed over, and be gone for that shell."""
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match=r"is the folder you are in.*: give it from outside"):
        hf_to_orbax(source, ".")
    with pytest.raises(CheckpointError, match=r"file/x cannot be made \(.*\): give another destination"):
        hf_to_orbax(source, tmp_path / "file" / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "file"} and not list(Path().iterdir())


def test_a_destination_may_be_a_link(source, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    hf_to_orbax(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and open_backbone(tmp_path / "big").trained
    assert {path.name for path in tmp_path.iterdir()} == {"big", "link"}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_number_too_large_for_float16_is_named_and_nothing_written(source, tmp_path, dtype):
    folder = Path(shutil.copytree(source, tmp_path / "large"))
    key = "model.layers.1.mlp.up_proj.weight"

    def enlarge(values):
        values.update({name: value.astype(dtype) for name, value in values.items()})
        values[key][3, 2] = -70_000

    rewrite(folder, enlarge)
    hf_to_orbax(folder, tmp_path / "stage")
    told = refused(tmp_path / "stage", tmp_path / "out", lambda here, there: orbax_to_hf(here, there, "float16"))
    assert told.startswith(f"{key}: ") and "does not fit float16, which ends at 65504: write bfloat16" in told


@pytest.mark.parametrize("way", ["hf-to-orbax", "orbax-to-hf"])
def test_too_small_a_disk_is_refused_before_anything_is_written(way, source, stage, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Path, "replace", lambda *arguments: pytest.fail("too late"))
    told = refused(source if way == "hf-to-orbax" else stage, tmp_path / "out", convert_worker.WAYS[way])
    assert "1,000 bytes free" in told and "make room" in told


@pytest.mark.parametrize("harm", ["length", "header", "offsets"])
def test_a_corrupt_header_is_named(source, tmp_path, harm):
    folder = Path(shutil.copytree(source, tmp_path / "bad"))
    data = bytearray((source / SINGLE_FILE).read_bytes())
    if harm == "length":
        data[:8] = (2**40).to_bytes(8, "little")
    elif harm == "header":
        data[8:40] = b"X" * 32
    else:
        at = data.index(b'"data_offsets":[') + 16
        data[at : at + 1] = b"9"
    (folder / SINGLE_FILE).write_bytes(data)
    told = refused(folder, tmp_path / "out")
    assert f"{SINGLE_FILE}: cannot be read" in told and "missing" not in told and "(1 problems)" in told


@pytest.mark.parametrize("way", ["hf-to-orbax", "orbax-to-hf"])
def test_a_taken_destination_is_untouched(way, source, stage, tmp_path):
    (tmp_path / "mine.txt").write_text("here")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert_worker.WAYS[way](source if way == "hf-to-orbax" else stage, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_stage_of_another_config_names_all_differences(stage, tmp_path):
    other = Path(shutil.copytree(stage, tmp_path / "stage"))
    values = json.loads((other / "backbone" / "config.json").read_text())
    text = values.get("text_config", values)
    text["vocab_size"] += 1
    text["num_hidden_layers"] += 1
    (other / "backbone" / "config.json").write_text(json.dumps(values))
    told = refused(other, tmp_path / "out", orbax_to_hf)
    assert "params/text/embed/table: the checkpoint has float32[160, 64], wanted float32[161, 64]" in told
    assert "(13 problems)" in told  # the table and every leaf that stacks the language model's layers


def test_damage_is_never_exported_and_an_older_step_is(trained, backbone, stage, tmp_path, caplog):
    other = Path(shutil.copytree(stage, tmp_path / "stage"))
    path = max((other / "checkpoints" / "0" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "all checkpoints" in refused(other, tmp_path / "out", orbax_to_hf)
    both = Path(shutil.copytree(trained, tmp_path / "both"))
    shutil.copytree(both / "checkpoints" / "1", both / "checkpoints" / "2")
    for path in (both / "checkpoints" / "2" / "params").rglob("d/*"):
        path.unlink()
    orbax_to_hf(both, tmp_path / "good")
    assert "checkpoints/2 is damaged" in caplog.text
    assert_same(tensors(tmp_path / "good"), tensors(backbone))


@pytest.mark.parametrize("way", ["hf-to-orbax", "orbax-to-hf"])
def test_without_room_is_one_clear_error(way, source, stage, tmp_path):
    folder = source if way == "hf-to-orbax" else stage
    said = run("without-room", way, folder, tmp_path / "out", 20_000)
    assert said.count("\n") == 1 and said.startswith("CheckpointError") and "make room" in said, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["hf-to-orbax", "orbax-to-hf"])
def test_killed_in_the_middle_nothing_looks_whole(way, source, stage, tmp_path):
    worker = process("for-ever", way, source if way == "hf-to-orbax" else stage, tmp_path / "many")
    assert worker.stdout is not None
    unfinished: list[Path] = []
    try:
        for _ in worker.stdout:
            while not unfinished and worker.poll() is None:
                unfinished = list((tmp_path / "many").glob(".*.partial/*"))
            break
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    assert worker.returncode == -signal.SIGKILL and unfinished
    for folder in (tmp_path / "many").iterdir():
        if folder.name.startswith("."):
            name = folder.name.removeprefix(".").removesuffix(".partial")
            assert not (tmp_path / "many" / name).exists()
            convert_worker.WAYS[way](source if way == "hf-to-orbax" else stage, tmp_path / "many" / name)
            assert not folder.exists()  # the next attempt removes what is left and is whole
        else:
            jax.tree.map(np.testing.assert_array_equal, open_backbone(folder).load(), open_backbone(source).load())


# ------------------------------------------------------------------------------------------- streaming, checksums


def test_few_leaves_are_alive_at_a_time(source, stage, tmp_path, monkeypatch):
    """Arrays are counted where they are made: two on the way in (one being written), one on the way out."""
    import gc
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def note(value: np.ndarray) -> np.ndarray:
        nonlocal most
        alive.append(weakref.ref(value))
        if sum(one() is not None for one in alive) > 2:
            gc.collect()
        most = max(most, sum(one() is not None for one in alive))
        return value

    leaves = read_leaves(source, abstract_params(read_config(source)))
    stream.save_params(tmp_path / "in", ((path, note(leaf)) for path, leaf in leaves), {})
    assert most <= 2 and len(alive) > 20
    alive, most = [], 0
    read = stream.StoredLeaf.__array__
    monkeypatch.setattr(stream.StoredLeaf, "__array__", lambda self, dtype=None, copy=None: note(read(self)))
    orbax_to_hf(stage, tmp_path / "out")
    assert most <= 2 and len(alive) > 20


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32, np.bool_])
@pytest.mark.parametrize("shape", [(), (5,), (64, 3), (2, 32, 32)])
def test_a_checksum_of_pieces_is_that_of_the_whole(dtype, shape, monkeypatch):
    monkeypatch.setattr(contents, "_PIECE", 64)
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    assert checksum_of(values) == checksums([jnp.asarray(values)])[0]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("count", [32, 1024, 65536])
def test_a_checksum_sees_changes_of_all_values_alike(dtype, count):
    values = np.random.default_rng(count).standard_normal(count).astype(dtype)
    changed = [values * 2, values * 4, -values, values / 2, np.roll(values, 1), values[::-1], np.zeros_like(values)]
    changed.append(np.concatenate([values[count // 2 :], values[: count // 2]]))
    found = {checksum_of(np.ascontiguousarray(value).astype(dtype)) for value in (values, *changed)}
    assert len(found) == 1 + len(changed)


# ------------------------------------------------------------------------------------------------ command line


def test_the_command(source, tmp_path, capsys):
    cli.main(["convert", "hf-to-orbax", str(source), str(tmp_path / "stage")])
    cli.main(["convert", "orbax-to-hf", str(tmp_path / "stage"), str(tmp_path / "out"), "--dtype", "float16"])
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {np.dtype(np.float16)}
    cli.main(["convert", "orbax-to-hf", str(tmp_path / "stage"), str(tmp_path / "two"), "--max-shard-size", "300kB"])
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 3
    assert capsys.readouterr() == ("", "")


def test_a_bar_hears_of_every_byte(source, tmp_path, monkeypatch):
    ended = []

    class Bar(convert.tqdm):
        def close(self):
            ended.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(convert, "tqdm", Bar)
    held = sum(value.nbytes for value in tensors(source).values())
    hf_to_orbax(source, tmp_path / "stage", progress=True)
    assert set(ended) == {(held, (source / SINGLE_FILE).stat().st_size)}  # the file has a header, too
    ended.clear()
    orbax_to_hf(tmp_path / "stage", tmp_path / "out", dtype="bfloat16", progress=True)
    assert set(ended) == {(held // 2, held // 2)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hf-to-orbax", "nowhere", "out"], "nowhere is not a folder"),
        (["orbax-to-hf", "nowhere", "out", "--dtype", "int8"], "int8"),
        (["orbax-to-hf", "nowhere", "out", "--max-shard-size", "much"], "'much' is no number of bytes"),
        (["sideways", "a", "b"], "sideways"),
        (["hf-to-orbax", "a"], "destination"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", *arguments])
    assert ended.value.code not in (0, None)
    said, told = capsys.readouterr()
    assert not said and told.count("\n") == 1 and told.startswith("cocoa: ") and words in told


def test_sizes():
    sizes = {"5": 5, "5B": 5, "2kb": 2000, "1.5MB": 1_500_000, "5GB": 5 * 10**9, "2 GiB": 2**31}
    assert {text: byte_count(text) for text in sizes} == sizes
    for text in ("", "GB", "-1", "0", "5 parsecs"):
        with pytest.raises(ValueError, match="no number of bytes"):
            byte_count(text)
