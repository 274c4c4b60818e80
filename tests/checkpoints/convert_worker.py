"""Run in a process of its own by test_convert: conversions to be killed, without room, or on several devices."""

import resource
import sys

import jax
import numpy as np

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.convert import hf_to_orbax, orbax_to_hf
from cocoa_jax.checkpoints.huggingface import read_folder
from cocoa_jax.config import MeshConfig
from cocoa_jax.models.lora import LoraConfig, merge_leaf
from cocoa_jax.training.mesh import make_mesh
from cocoa_jax.training.sharding import param_shardings

WAYS = {"hf-to-orbax": hf_to_orbax, "orbax-to-hf": orbax_to_hf}


def on_mesh(folder: str) -> None:
    """The folder read straight onto 2 x 2 x 2 devices is the folder read into host memory, placed as asked."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    backbone = open_backbone(folder)
    expected = backbone.load()
    shardings = param_shardings({"backbone": expected}, mesh)["backbone"]
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), expected, shardings)
    placed = backbone.load(wanted)
    jax.tree.map(np.testing.assert_array_equal, placed, expected)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, placed, shardings))
    kernel = placed["text"]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    # A leaf that is merged stays where it lies, and is what it would be on one device.
    rng, rank = np.random.default_rng(0), 2
    layers, inputs, outputs = kernel.shape
    part = {
        "a": rng.standard_normal((layers, inputs, rank), np.float32),
        "b": np.ones((layers, rank, outputs), np.float32),
    }
    part["magnitude"] = np.abs(rng.standard_normal((layers, outputs), np.float32)) + 1
    merged = merge_leaf(kernel, part, LoraConfig(rank=rank), ())
    assert merged.sharding == kernel.sharding
    alone = merge_leaf(np.asarray(kernel), part, LoraConfig(rank=rank), ())
    np.testing.assert_allclose(merged, alone, rtol=1e-5, atol=1e-5)  # norms are summed over the devices
    if not backbone.trained:
        jax.tree.map(np.testing.assert_array_equal, read_folder(folder, wanted), expected)


def main(action: str, *arguments: str) -> None:
    if action == "on-mesh":
        on_mesh(*arguments)
    elif action == "without-room":
        way, source, destination, size = arguments
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
        try:
            WAYS[way](source, destination)
        except ValueError as error:
            sys.stdout.write(f"{type(error).__name__}: {error}\n")
    elif action == "for-ever":  # the test kills it in the middle
        way, source, destination = arguments
        for number in range(10**6):
            WAYS[way](source, f"{destination}/{number}")
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
