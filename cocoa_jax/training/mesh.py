"""The device mesh of a run."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoa_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))  # rows are spread over both; parameters over fsdp and tensor


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Devices along each of ``AXES``, with -1 worked out.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {config}: sizes are positive, and at most one is -1")
    if -1 in sizes and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if math.prod(sizes) != devices:
        raise ValueError(f"mesh {config} asks for {fixed} devices at least, there are {devices}: change mesh.data")
    return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices of all hosts.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = mesh_sizes(config, jax.device_count())
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """How many equal parts the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
