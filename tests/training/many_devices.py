"""Run in a process of its own by test_step: the losses of ten steps of every stage, and of one with
an adapter, on one device and on meshes of eight."""

import dataclasses
import json
import sys
from unittest import mock

import jax
from jax.sharding import Mesh

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.data.pairs import picture_source
from cocoa_jax.data.pipeline import stage_dataset
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.sources import load_pictures
from cocoa_jax.training import mesh as module
from cocoa_jax.training.mesh import AXES, MeshConfig, batch_shards, make_mesh
from cocoa_jax.training.optimizer import make_optimizer
from cocoa_jax.training.place import place
from cocoa_jax.training.stages import stage_program
from cocoa_jax.training.state import abstract_state, first_state
from cocoa_jax.training.step import make_step

STEPS = 10


def one_device() -> Mesh:
    return jax.make_mesh((1, 1, 1, 1), AXES, (jax.sharding.AxisType.Auto,) * 4, devices=jax.devices()[:1])


def two_slices() -> Mesh:
    """As on a platform whose second four devices are another slice; no setting of the mesh says so."""
    devices = jax.devices()
    with mock.patch.object(module, "_slices", lambda: {1: devices[4:], 0: devices[:4]}):
        return make_mesh(MeshConfig(fsdp=2))


def losses(config: TrainConfig, mesh: Mesh) -> dict[str, object]:
    """Every loss, and how many devices hold a share of the largest parameter and of a batch."""
    backbone = open_backbone(config.checkpoint)
    processor = Processor.load(backbone.side_files, backbone.config, config.data.processor)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    program = stage_program(config, backbone.config, special=(382, 383))
    wanted = abstract_state(program.shapes, optimizer, mesh)
    params = backbone.load(wanted.params["backbone"])
    state = first_state(program.first_params(params), optimizer, wanted)
    step = make_step(program.loss, optimizer, wanted, config.loop.steps)
    pictures = load_pictures(config.data.split)
    sources = {kind: picture_source(kind, pictures) for kind in config.data.kinds}
    found = []
    for batch in stage_dataset(config.batches(), sources, config.data.kinds, processor, seed=1, steps=STEPS):
        del batch["stats"]
        batch = place(batch, mesh)
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    arrays = {"table": state.params["backbone"]["text"]["embed"]["table"], "tokens": batch["tokens"]}
    if config.lora is not None:
        arrays["magnitude"] = state.params["adapter"]["text"]["layers"]["mlp"]["up_proj"]["magnitude"]
    shares = {name: len({str(shard.index) for shard in x.addressable_shards}) for name, x in arrays.items()}
    kept = {"params": state.params, "optimizer": state.optimizer, "loss": metrics["loss"]}
    types = {name: sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)}) for name, tree in kept.items()}
    spread = {"batch_shards": batch_shards(mesh), "slices": mesh.shape["slice"], **shares}
    return {"losses": found, "types": types, **spread}


def main(settings: str) -> None:
    assert jax.device_count() == 8
    results = {}
    for name, (values, meshes) in json.loads(settings).items():
        config = parse(TrainConfig, values)
        found = {"one": losses(config, one_device())}
        for mesh in meshes:
            # Where every device has several rows, it takes them one by one; the same numbers are dropped.
            compute = dataclasses.replace(config.compute, chunk_rows=1, chunk_tokens=2, remat="attention")
            found[mesh] = losses(dataclasses.replace(config, compute=compute), MESHES[mesh]())
        results[name] = found
    json.dump(results, sys.stdout)


MESHES = {
    "data": lambda: make_mesh(MeshConfig()),
    "fsdp": lambda: make_mesh(MeshConfig(data=1, fsdp=8)),
    "cube": lambda: make_mesh(MeshConfig(fsdp=2, tensor=2)),
    "slices": two_slices,
}

if __name__ == "__main__":
    main(sys.argv[1])
