"""What sharing parameters over chips wastes: parts are stored in whole tiles, and a part can be less than a tile."""

import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from cocoa_jax.config import TrainConfig, load_config
from cocoa_jax.profiling.plan_search import changed
from cocoa_jax.profiling.steps import read_backbone
from cocoa_jax.recipe import read_recipe
from cocoa_jax.training.mesh import AXES, MeshConfig, mesh_sizes
from cocoa_jax.training.optimizer import make_optimizer
from cocoa_jax.training.stages import stage_program
from cocoa_jax.training.state import abstract_state

REPOSITORY = Path(__file__).parents[2]
PODS = sorted((REPOSITORY / "configs/pods").glob("*.yaml"))
RECIPES = sorted((REPOSITORY / "configs/recipes").glob("*.yaml"))
BACKBONES = ("qwen2-vl-2b", "qwen2-vl-7b", "qwen2.5-vl-3b", "qwen2.5-vl-7b")


def stored(shape: list[int], size: int) -> int:
    """Bytes of an array of elements of ``size`` bytes in a chip: the better of its two last axes lies in 128 lanes, the
    other in tiles of 32 bytes; a vector has no such tiles."""
    if len(shape) < 2:
        return math.prod(shape) * size
    *lead, a, b = shape
    lanes, tile = 128, 32 // size
    whole = [-(-x // tile) * tile * (-(-y // lanes) * lanes) for x, y in ((a, b), (b, a))]
    return math.prod(lead) * min(whole) * size


def waste(config: TrainConfig, backbone: str, devices: int) -> float:
    """Bytes that all chips hold beyond those of the state, as a share of those; of what is shared between chips."""
    mesh = AbstractMesh(mesh_sizes(config.mesh, devices), AXES)
    program = stage_program(config, read_backbone(f"configs/backbones/{backbone}"), (1, 2))
    state = abstract_state(program.shapes, make_optimizer(config.optimizer, config.loop.steps), mesh)
    have = held = 0
    for leaf in jax.tree.leaves(state):
        spec = (*leaf.sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
        parts = [1 if axis is None else mesh.shape[axis] for axis in spec]
        if math.prod(parts) > 1:
            own = [-(-length // part) for length, part in zip(leaf.shape, parts, strict=True)]
            have += stored(own, leaf.dtype.itemsize) * math.prod(parts)
            held += math.prod(leaf.shape) * leaf.dtype.itemsize
    return have / held - 1


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_meshes_of_the_pods_waste_nothing(training, backbone):
    """Stage 1 has the parameters of all stages, and a head."""
    config = load_config(TrainConfig, REPOSITORY / f"configs/pods/1-warmup-{training}.yaml")
    # What is left: biases and magnitudes of adapters, whose rank of 8 fills half a tile.
    assert 0 <= waste(config, backbone, 256) < 0.005


def test_a_mesh_that_pads_is_seen():
    """Why the files say ``fsdp: 16``: 1,536 rows over 64 chips are 24 each, which bfloat16 stores as 32."""
    config = load_config(TrainConfig, REPOSITORY / "configs/pods/1-warmup-lora.yaml")
    assert waste(changed(config, {"mesh.fsdp": 64}), "qwen2-vl-2b", 256) > 0.3


def test_every_file_has_such_a_mesh():
    for path in PODS:
        assert load_config(TrainConfig, path).mesh == MeshConfig(data=-1, fsdp=16), path
    for path in RECIPES:
        for name, stage in read_recipe(path).stages.items():
            # As many devices as the rows of stage 2 can be shared by.
            assert mesh_sizes(MeshConfig(**stage["mesh"]), 16) == (1, 1, 16, 1), (path, name)
    assert PODS and RECIPES
