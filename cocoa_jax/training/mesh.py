"""The device mesh of a run."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoa_jax.attention.divide import ROWS
from cocoa_jax.config import MeshConfig

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = PartitionSpec(ROWS)  # rows are spread over all of these; parameters over fsdp and tensor


def mesh_sizes(config: MeshConfig, devices: int, slices: int = 1) -> tuple[int, int, int, int]:
    """Devices along each of ``AXES``, with -1 worked out.

    Args:
        devices: of all slices.
        slices: how many slices there are; 1 where it is not known.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or slices would be cut.
    """
    sizes = [config.slice, config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {config}: sizes are positive, and at most one is -1")
    if -1 in sizes and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if math.prod(sizes) != devices:
        raise ValueError(f"mesh {config} asks for {fixed} devices at least, there are {devices}: change mesh.data")
    if slices > 1 and sizes[0] != slices:
        raise ValueError(f"mesh {config} on {slices} slices: set mesh.slice to {slices}")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def mesh_here(config: MeshConfig) -> MeshConfig:
    """``config`` where it suits the devices that are here; else parameters and rows shared by all of them."""
    slices = len(_slices())
    try:
        mesh_sizes(config, jax.device_count(), slices)
    except ValueError:
        return MeshConfig(data=1, fsdp=-1, slice=slices)
    return config


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices of all hosts.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    slices = _slices()
    sizes = mesh_sizes(config, jax.device_count(), len(slices))
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    if len(slices) == 1:
        return jax.make_mesh(sizes, AXES, axis_types=kinds)
    # Each slice is laid out on its own interconnect; only the first axis leaves it.
    parts = [jax.make_mesh((1, *sizes[1:]), AXES, kinds, devices=slices[number]).devices for number in sorted(slices)]
    return Mesh(np.concatenate(parts), AXES, axis_types=kinds)


def _slices() -> dict[int, list[jax.Device]]:
    """The devices of each slice; everything is one slice where the platform knows of none."""
    found: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        found.setdefault(device.slice_index if device.platform == "tpu" else 0, []).append(device)
    return found


def batch_shards(mesh: Mesh) -> int:
    """How many equal parts the rows of a batch are cut into."""
    return math.prod(mesh.shape[name] for name in ROWS)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
