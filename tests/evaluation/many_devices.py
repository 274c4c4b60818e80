"""Run in a process of its own by test_hosts: embeddings on eight virtual devices that share the weights."""

import dataclasses
import json
import sys

import jax

from cocoa_jax.config import MeshConfig
from cocoa_jax.embedder import Embedder, default_settings
from cocoa_jax.training.mesh import mesh_here

MESHES = {"fsdp": MeshConfig(data=1, fsdp=8), "cube": MeshConfig(data=2, fsdp=2, tensor=2)}


def main(checkpoint: str, items: str) -> None:
    assert jax.device_count() == 8
    found = {}
    settings = default_settings(checkpoint)
    for name, mesh in MESHES.items():
        assert mesh_here(mesh) == mesh
        compute = dataclasses.replace(settings.compute, chunk_rows=1 if name == "cube" else None)
        embedder = Embedder(checkpoint, dataclasses.replace(settings, mesh=mesh, compute=compute))
        table = embedder._params["text"]["embed"]["table"]
        shares = len({str(shard.index) for shard in table.addressable_shards})
        found[name] = {"rows": embedder.embed(json.loads(items)).tolist(), "shares": shares}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
