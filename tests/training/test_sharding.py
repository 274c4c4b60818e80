"""Every parameter of both families has its place on the mesh."""

import json
import re
from pathlib import Path

import jax
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cocoa_jax.models.config import parse_config, read_config
from cocoa_jax.models.lora import LoraConfig, adapted_graph
from cocoa_jax.models.mae import decoder_graph
from cocoa_jax.models.qwen2_vl import Compute, abstract_params
from cocoa_jax.training.mesh import MeshConfig, make_mesh
from cocoa_jax.training.sharding import TABLE, param_shardings, path_of, spec_of, state_shardings

FAMILIES = ("qwen2", "qwen2_5")
BACKBONES = ("qwen2-vl-2b", "qwen2-vl-7b", "qwen2.5-vl-3b", "qwen2.5-vl-7b")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shapes(golden):
    """Abstract parameters of a family with the stage-1 head; one with a tied head, one without."""
    made = {}
    for family in FAMILIES:
        values = json.loads((golden / f"{family}.config.json").read_text())
        config = parse_config({**values, "tie_word_embeddings": family == "qwen2"})
        targets = (r"text\.layers\..*", r"vision\.layers\..*", r"vision\.merger\.fc[12]")
        adapter = adapted_graph(config, Compute(), LoraConfig(targets=targets), (1, 2))[1]
        made[family] = {"backbone": abstract_params(config), "head": decoder_graph(config)[1], "adapter": adapter}
    return made


def by_path(tree):
    return {path_of(keys): leaf for keys, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_spec_of_its_rank(shapes, family):
    for path, leaf in by_path(shapes[family]).items():
        spec = spec_of(path)
        assert len(spec) <= leaf.ndim, path
        if path.endswith(("kernel", "table")):
            assert len(spec) == leaf.ndim and spec != P(*[None] * leaf.ndim), f"{path} is large and on every device"
        if "/layers/" in path:
            assert not spec or spec[0] is None, f"{path}: layers are never split"
        names = [name for name in spec if name is not None]
        assert len(names) == len(set(names)) and set(names) <= {"fsdp", "tensor"}


def test_no_line_of_the_table_is_idle_or_hidden_by_another(shapes):
    paths = {path for family in FAMILIES for path in by_path(shapes[family])}
    for number, (pattern, _, spec) in enumerate(TABLE):
        reached = [path for path in paths if re.search(rf"(^|/){pattern}$", path) and spec_of(path) == spec]
        assert reached, f"line {number} of the table, {pattern}, is reached by no parameter"


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("backbone/text/embed/table", P("tensor", "fsdp")),
        ("backbone/text/head/kernel", P("fsdp", "tensor")),
        ("backbone/text/layers/attention/q_proj/kernel", P(None, "fsdp", "tensor")),
        ("backbone/text/layers/attention/k_proj/bias", P(None, "tensor")),
        ("backbone/text/layers/attention/o_proj/kernel", P(None, "tensor", "fsdp")),
        ("backbone/text/layers/mlp/down_proj/kernel", P(None, "tensor", "fsdp")),
        ("backbone/text/norm/scale", P()),
        ("backbone/vision/patch_embed/kernel", P(None, "fsdp")),
        ("backbone/vision/layers/mlp/fc1/kernel", P(None, "fsdp", "tensor")),
        ("backbone/vision/layers/mlp/gate_proj/kernel", P(None, "fsdp", "tensor")),
        ("backbone/vision/merger/fc2/kernel", P("tensor", "fsdp")),
        ("head/layer/attention/q_proj/kernel", P("fsdp", "tensor")),
        ("head/proj/kernel", P("fsdp", "tensor")),
        ("adapter/text/layers/attention/q_proj/a", P(None, "fsdp", None)),
        ("adapter/text/layers/attention/q_proj/b", P(None, None, "tensor")),
        ("adapter/text/layers/mlp/down_proj/a", P(None, "tensor", None)),
        ("adapter/text/layers/mlp/down_proj/magnitude", P(None, "fsdp")),
        ("adapter/vision/layers/attention/qkv/magnitude", P(None, "tensor")),
        ("adapter/text/embed/rows", P()),
    ],
)
def test_specs(path, spec):
    assert spec_of(path) == spec


def specs_of(name):
    """Every parameter of a published backbone, adapted and with the stage-1 head: path, shape and spec, a line each."""
    config = read_config(REPOSITORY / "configs/backbones" / name)
    shapes = {"backbone": abstract_params(config), "head": decoder_graph(config)[1]}
    shapes["adapter"] = adapted_graph(config, Compute(), LoraConfig(), (1, 2))[1]
    return [
        f"{path} {list(leaf.shape)} {','.join(str(axis) for axis in spec_of(path)) or '-'}"
        for path, leaf in sorted(by_path(shapes).items())
    ]


@pytest.mark.parametrize("name", BACKBONES)
def test_specs_of_published_backbones(golden, name):
    """Against the file that ``python tests/training/test_sharding.py`` writes; each has a letter for every axis."""
    lines = specs_of(name)
    assert lines == (golden / f"{name}.specs.txt").read_text().splitlines()
    for line in lines:
        path, shape = line.split("]")[0].split(" [")
        letters = next(letters for pattern, letters, _ in TABLE if re.search(rf"(^|/){pattern}$", path))
        assert letters == "any" or len(letters.split()) == len(shape.split(", ")), line


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("fsdp", [16, 32])
def test_usual_meshes_pad_no_kernel(name, fsdp):
    """What a device holds of a kernel is an equal share, and of whole rows of eight where they are split."""
    for line in specs_of(name):
        path, rest = line.split(" [")
        shape, axes = [int(side) for side in rest.split("] ")[0].split(", ")], rest.split("] ")[1].split(",")
        if path.startswith("adapter") or not path.endswith(("kernel", "table")):
            continue
        if "fsdp" not in axes:
            assert "patch_embed" in path
            continue
        place = axes.index("fsdp")
        assert shape[place] % fsdp == 0, line
        if place == len(shape) - 2:
            assert shape[place] // fsdp % 8 == 0, line


@pytest.mark.parametrize("path", ["backbone/text/embed/tables", "head/other/kernel", "backbone/vision/pos/table"])
def test_an_unknown_parameter_is_refused(path):
    with pytest.raises(KeyError, match=f"no sharding for parameter {path}"):
        spec_of(path)


def test_moments_lie_where_their_parameters_lie(shapes):
    params, mesh = shapes["qwen2"], make_mesh(MeshConfig())
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimizer.init, params)
    placed = state_shardings(state, params, mesh)
    want = jax.tree.map(lambda sharding: sharding.spec, param_shardings(params, mesh))
    adam = placed[1][0]
    for moments in (adam.mu, adam.nu):
        assert jax.tree.map(lambda sharding: sharding.spec, moments) == want
    assert adam.count.spec == P()


if __name__ == "__main__":
    for backbone in BACKBONES:
        (REPOSITORY / f"tests/golden/{backbone}.specs.txt").write_text("\n".join(specs_of(backbone)) + "\n")
