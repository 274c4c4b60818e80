"""The train step from settings alone: the batch that it expects, a real compilation, and its report."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh

from cocoa_jax import cli
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.chips import CHIPS
from cocoa_jax.config import TrainConfig, load_config, parse, to_dict
from cocoa_jax.data.pairs import picture_source
from cocoa_jax.data.pipeline import stage_dataset
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.sources import load_pictures
from cocoa_jax.models.config import read_config
from cocoa_jax.profiling.cells import Cells
from cocoa_jax.profiling.step_cost import row_kernels, step_markdown, step_spec
from cocoa_jax.profiling.steps import abstract_batch, abstract_step, parameter_count, read_backbone
from cocoa_jax.profiling.trace import record_trace
from cocoa_jax.training.mesh import AXES

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = {"qwen2-vl-2b": 2.2e9, "qwen2-vl-7b": 8.3e9, "qwen2.5-vl-3b": 3.75e9, "qwen2.5-vl-7b": 8.3e9}

# Both towers, in both passes, by their scopes in the source.
KERNELS = [
    f"stage2/{tower}/attention/span_attention_{phase}"
    for tower in ("text", "vision")
    for phase in ("backward", "forward")
]


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)


@pytest.mark.parametrize("stage", ["warmup", "bridge", "pictures", "contrastive"])
def test_the_described_batch_is_the_one_that_the_pipeline_makes(stage, backbone, stage_settings, tmp_path):
    settings = stage_settings("bridge" if stage == "pictures" else stage, backbone, tmp_path)
    if stage == "pictures":
        settings["data"] |= {"kinds": {"bridge-from-words": 1.0}, "masking": {"text_ratio": 0.5, "image_ratio": 0.5}}
    config = parse(TrainConfig, settings)
    opened = open_backbone(backbone)
    processor = Processor.load(opened.side_files, opened.config, config.data.processor)
    sources = {kind: picture_source(kind, load_pictures(config.data.split)) for kind in config.data.kinds}
    batch = stage_dataset(config.batches(), sources, config.data.kinds, processor, seed=0, steps=1)[0]
    del batch["stats"]
    described = abstract_batch(config, opened.config, one_device())
    assert {name: (x.shape, x.dtype) for name, x in described.items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = load_config(TrainConfig, REPOSITORY / "configs/profile/2b-bridge.yaml")
    sizes = read_backbone(f"configs/backbones/{name}")
    _, state, _ = abstract_step(config, sizes, one_device())
    # Counts of the published checkpoints, to their two or three digits.
    assert parameter_count(state) == pytest.approx(PUBLISHED[name], rel=0.01)


def test_scopes_can_be_read_in_a_trace(backbone, stage_settings, tmp_path):
    config = parse(TrainConfig, stage_settings("bridge", backbone, tmp_path))
    step, state, batch = abstract_step(config, read_config(backbone), one_device())
    text = step.lower(state, batch).as_text(debug_info=True)
    for scope in ("stage2/text", "stage2/vision", "stage2/loss", "optimizer"):
        assert scope in text.replace("jvp(stage2)", "stage2"), scope


def test_windowed_layers_are_counted_as_windows():
    config = load_config(TrainConfig, REPOSITORY / "configs/pods/3-contrastive-lora.yaml")
    sizes = read_backbone("configs/backbones/qwen2.5-vl-7b")

    def flops(full_layers):
        vision = dataclasses.replace(sizes.vision, full_layers=full_layers)
        table = row_kernels(config, dataclasses.replace(sizes, vision=vision), one_device(), CHIPS["v5e"])
        return table["vision/span_attention_forward"].flops

    whole, none, own = flops(tuple(range(32))), flops(()), flops(sizes.vision.full_layers)
    assert none < whole / 1.9
    assert own == pytest.approx((4 * whole + 28 * none) / 32)  # four of its layers see whole pictures


@pytest.mark.parametrize(("tensor", "share"), [(2, 2), (4, 4), (5, 1)])
def test_heads_are_counted_as_attention_divides_them(tensor, share):
    """12 query heads on 2 key heads: four devices have three of one key head, five cannot divide them."""
    config = load_config(TrainConfig, REPOSITORY / "configs/pods/2-bridge-lora.yaml")

    def flops(tensor):
        mesh = jax.sharding.AbstractMesh((1, 1, 1, tensor), AXES)
        return row_kernels(config, read_backbone("configs/backbones/qwen2-vl-2b"), mesh, CHIPS["v5e"])

    name = "text/span_attention_forward"
    assert flops(tensor)[name].flops == pytest.approx(flops(1)[name].flops / share)


@pytest.fixture(scope="module")
def compiled(backbone, stage_settings, tmp_path_factory):
    """A small stage 2 for a host of four v5e, sharded over fsdp."""
    settings = stage_settings("bridge", backbone, tmp_path_factory.mktemp("step"))
    config = parse(TrainConfig, settings | {"mesh": {"data": 1, "fsdp": -1}})
    return Cells(None).get(step_spec(to_dict(config), "v5e:2x2", 1))


def test_a_compiled_step(compiled):
    assert compiled["mesh"] == {"slice": 1, "data": 1, "fsdp": 4, "tensor": 1}
    assert 0 < compiled["memory"]["arguments"] < compiled["memory"]["peak"] < compiled["memory"]["capacity"]
    assert compiled["seconds"] >= max(compiled["mxu_seconds"], 0.0) and compiled["flops"] > 0
    kinds = {row["kind"] for row in compiled["sent"]}
    assert "all-gather" in kinds and {row["axis"] for row in compiled["sent"]} <= {"fsdp", "other"}
    assert any(scope.startswith("stage2/text") for scope in compiled["scopes"])
    assert compiled["kernels"] == KERNELS
    text = step_markdown(compiled)
    assert "static model: compiled for that slice, not run" in text and "measured" not in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_step_of_the_2b_backbone_runs_the_span_kernels():
    config = load_config(TrainConfig, REPOSITORY / "configs/profile/2b-bridge.yaml")
    result = Cells(None).get(step_spec(to_dict(config), "v5e:4x4", 1))
    assert result["kernels"] == KERNELS
    assert result["memory"]["peak"] < result["memory"]["capacity"]


@pytest.mark.parametrize(
    ("topology", "more", "message"),
    [
        ("v5e:5x5", [], "topology 'v5e:5x5' is unknown"),
        ("v5e:2x2", ["--mesh.fsdp=3", "--mesh.data=1"], "4 devices that there are: set mesh.fsdp to -1"),
    ],
)
def test_the_command_refuses_in_one_line(topology, more, message, backbone, stage_settings, tmp_path, capsys):
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(stage_settings("bridge", backbone, tmp_path)))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["profile", "step", "--config", str(path), "--topology", topology, *more])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 1 and message in said and "\n" not in said


def test_a_trace_of_real_steps(backbone, stage_settings, tmp_path):
    config = parse(TrainConfig, stage_settings("bridge", backbone, tmp_path / "run"))
    folder = record_trace(config, 1, tmp_path / "trace")
    assert list(folder.rglob("*.xplane.pb"))
    assert not (tmp_path / "run").exists()  # nothing is trained
    few = dataclasses.replace(config.loop, steps=2)
    with pytest.raises(ValueError, match="1 steps to trace after 2"):
        record_trace(dataclasses.replace(config, loop=few), 1, tmp_path / "other")


def test_a_spec_is_plain_json(backbone, stage_settings, tmp_path):
    config = parse(TrainConfig, stage_settings("bridge", backbone, tmp_path))
    spec = step_spec(to_dict(config), "v5e:2x2", 1)
    assert parse(TrainConfig, json.loads(json.dumps(spec))["config"]) == config
