"""The device mesh of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoa_jax.attention.divide import ROWS
from cocoa_jax.config import MeshConfig

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = PartitionSpec(ROWS)  # rows are spread over all of these; parameters over fsdp and tensor


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """What the compiler has to be told of a program whose parameters are shared by the devices of ``mesh``.

    That of TPUs, left alone, multiplies by the parts of a gathered weight one by one as they come in, and sends the
    float32 sum through HBM for every part. Gathered whole, behind other work, a weight is multiplied by once.
    """
    tpu = mesh.devices.flat[0].platform == "tpu"
    return {"xla_tpu_enable_windowed_einsum_for_all_gather": False} if tpu else None


def mesh_sizes(config: MeshConfig, devices: int, slices: int | None = None) -> tuple[int, int, int, int]:
    """Devices along each of ``AXES``, with -1 worked out.

    Args:
        devices: of all slices.
        slices: how many slices there are; None where the platform knows of none.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or slices would be cut.
    """
    sizes = {axis: vars(config)[axis] for axis in AXES}
    if sizes["slice"] == -1:
        sizes["slice"] = slices or 1
    if slices not in (None, sizes["slice"]):
        raise ValueError(f"mesh.slice is {sizes['slice']}, the number of slices is {slices}: leave it at -1")
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis} is {size}: give 1 or more, or -1 for what the other axes leave")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        names = " and ".join(f"mesh.{axis}" for axis in open_axes)
        raise ValueError(f"{names} are -1: one of them takes what the others leave, give the other a number")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (fixed != devices and not open_axes):
        raise ValueError(_mismatch(sizes, devices))
    found = [devices // fixed if size == -1 else size for size in sizes.values()]
    return found[0], found[1], found[2], found[3]


def _mismatch(sizes: Mapping[str, int], devices: int) -> str:
    """Why these sizes do not come to so many devices, and which of them to change."""
    given = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    total = math.prod(size for size in sizes.values() if size != -1)
    opened = [axis for axis in AXES[1:] if -1 not in sizes.values() and devices % (total // sizes[axis]) == 0]
    large = " x ".join(f"mesh.{axis}" for axis, size in sizes.items() if size > 1)
    remedy = f"set mesh.{opened[0]} to -1" if opened else f"make {large} a divisor of {devices}"
    return f"{given} does not come to the {devices} devices that there are: {remedy}"


def mesh_here(config: MeshConfig) -> MeshConfig:
    """``config`` where it suits the devices that are here; else parameters and rows shared by all of them."""
    try:
        mesh_sizes(config, jax.device_count(), len(_slices()) or None)
    except ValueError:
        return MeshConfig(data=1, fsdp=-1)
    return config


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices of all hosts.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or slices would be cut.
    """
    slices = _slices()
    sizes = mesh_sizes(config, jax.device_count(), len(slices) or None)
    parts = [slices[number] for number in sorted(slices)] or [jax.devices()]
    return mesh_over(parts, dict(zip(AXES, sizes, strict=True)))


def mesh_over(slices: Sequence[Sequence[Any]], sizes: Mapping[str, int]) -> Mesh:
    """A mesh over the devices of slices, each of them laid out on its own interconnect as JAX would.

    Several are cut along the first axis of more than one device, a multiple of their number: every later axis stays
    inside of a slice.

    Args:
        slices: the devices of each.
        sizes: devices along each axis.
    """
    part = list(sizes.values())
    cut = next((at for at, size in enumerate(part) if size > 1), 0)
    part[cut] //= len(slices)
    # An axis may have a part of a side: 16 of the devices of an 8x8 have no side to themselves.
    laid = [create_device_mesh(part, list(devices), allow_split_physical_axes=True) for devices in slices]
    return Mesh(np.concatenate(laid, axis=cut), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(part))


def _slices() -> dict[int, list[jax.Device]]:
    """The devices of each slice; none where the platform knows of no slices."""
    found: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        if device.platform == "tpu":
            found.setdefault(getattr(device, "slice_index", 0), []).append(device)
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
