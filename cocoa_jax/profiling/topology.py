"""Ahead-of-time compilation for a named TPU slice on a machine that has none."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from cocoa_jax.chips import CHIPS, Chip, known_topologies
from cocoa_jax.training.mesh import mesh_over

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # nothing of the machine's own is to be used
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks a cloud metadata server, and waits for it
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened, so that several processes may compile at once
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""What a process that compiles for a slice needs to have set before JAX starts."""


class TopologyError(ValueError):
    """A slice that does not exist, a mesh that does not fit it, or no compiler for it."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice, or several alike that are joined by the data-centre network.

    Args:
        name: such as ``v5e:4x4``.
        chip: its chip.
        devices: of all slices, slice after slice; they compile and do not run.
        slices: how many.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    slices: int

    @property
    def ici_bandwidth(self) -> float:
        """Bytes a second that the device with the fewest links can send inside of its slice."""
        return self.chip.bandwidth_in(self.name.partition(":")[2])


def parse_topology(name: str, num_slices: int = 1) -> tuple[Chip, int]:
    """The chip and the number of JAX devices of a slice, without loading a compiler.

    Raises:
        TopologyError: the name is unknown, with those that are known.
    """
    if name not in known_topologies():
        known = "; ".join(f"{chip.name}:{{{','.join(chip.shapes)}}}" for chip in CHIPS.values() if chip.shapes)
        raise TopologyError(f"topology {name!r} is unknown: choose one of {known}")
    if num_slices < 1:
        raise TopologyError(f"{num_slices} slices of {name}: give 1 or more")
    kind, shape = name.split(":")
    chip = CHIPS[kind]
    return chip, math.prod(map(int, shape.split("x"))) * chip.devices_per_chip * num_slices


@functools.cache  # a second description of the same slice has devices that do not mix with the first one's
def tpu_slice(name: str, num_slices: int = 1) -> Slice:
    """Describe a slice to compile for.

    Raises:
        TopologyError: an unknown name, no libtpu, or a slice that libtpu refuses.
    """
    chip, count = parse_topology(name, num_slices)
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f"compiling for {name} needs libtpu: pip install 'libtpu==0.0.42.*' (it needs no TPU)")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    shape = [int(side) for side in name.split(":")[1].split("x")]
    if math.prod(shape) < math.prod(chip.host):
        options["chips_per_host_bounds"] = [1, 1, 1]  # a part of a host
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu's errors are of XLA's runtime class
        raise TopologyError(f"libtpu refuses topology {name} x {num_slices}: {_first_line(error)}") from error
    devices = tuple(described.devices)
    if len(devices) != count:
        raise TopologyError(f"topology {name} x {num_slices} has {len(devices)} devices, expected {count}")
    return Slice(name, chip, devices, num_slices)


def slice_mesh(target: Slice, sizes: Mapping[str, int]) -> Mesh:
    """The mesh over all devices of a slice that a run there would have, see ``mesh_over``.

    Args:
        sizes: devices along each axis; they multiply to the number of devices.
    Raises:
        TopologyError: they do not, or the first axis is no multiple of the number of slices.
    """
    count = len(target.devices)
    if math.prod(sizes.values()) != count:
        raise TopologyError(
            f"mesh {dict(sizes)} has {math.prod(sizes.values())} devices, {target.name} x {target.slices} has {count}: "
            "change the mesh or the topology"
        )
    axis, first = next(((name, size) for name, size in sizes.items() if size > 1), ("", 1))
    if first % target.slices:
        raise TopologyError(
            f"mesh {dict(sizes)} on {target.slices} slices: {axis} is {first}, no multiple of the slices; change it"
        )
    each = count // target.slices
    return mesh_over([target.devices[at : at + each] for at in range(0, count, each)], sizes)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
