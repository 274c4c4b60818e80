"""Run in a process of its own by test_hosts: embeddings on eight virtual devices that share the weights."""

import dataclasses
import json
import sys

import jax

from cocoa_jax.config import MeshConfig
from cocoa_jax.embedder import Embedder, default_settings
from cocoa_jax.training.mesh import mesh_here

MESH = MeshConfig(data=1, fsdp=8)


def main(checkpoint: str, items: str) -> None:
    assert jax.device_count() == 8
    assert mesh_here(MESH) == MESH
    settings = default_settings(checkpoint)
    compute = dataclasses.replace(settings.compute, chunk_rows=1)  # a device has two
    embedder = Embedder(checkpoint, dataclasses.replace(settings, mesh=MESH, compute=compute))
    table = embedder._params["text"]["embed"]["table"]
    shares = len({str(shard.index) for shard in table.addressable_shards})
    json.dump({"rows": embedder.embed(json.loads(items)).tolist(), "shares": shares}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
