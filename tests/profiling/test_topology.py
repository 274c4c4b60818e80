"""What is refused before anything is compiled, and the table of chips."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from cocoa_jax.chips import CHIPS, chip_of_kind, known_topologies
from cocoa_jax.config import MeshConfig
from cocoa_jax.profiling.topology import Slice, TopologyError, parse_topology, slice_mesh, tpu_slice
from cocoa_jax.training import mesh


def test_devices_of_a_slice():
    assert parse_topology("v5e:4x4")[1] == 16
    assert parse_topology("v5p:2x2x4", 2)[1] == 32
    assert parse_topology("tpu7x:2x2x1")[1] == 8  # two devices a chip


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v9:1x1", "v5e:4x4x4", "v4:2x2x1", ""])
def test_an_unknown_topology_is_refused_with_those_that_are_known(name):
    with pytest.raises(TopologyError, match=r"is unknown: choose one of v5e:\{1x1,2x2.*v6e:\{"):
        parse_topology(name)


def test_no_slices_are_refused():
    with pytest.raises(TopologyError, match="0 slices of v5e:4x4"):
        parse_topology("v5e:4x4", 0)


def test_a_missing_libtpu_says_how_to_install_it(monkeypatch):
    tpu_slice.cache_clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    with pytest.raises(TopologyError, match=r"needs libtpu: pip install 'libtpu==0\.0\.42\.\*'"):
        tpu_slice("v5e:1x1")


@pytest.mark.parametrize(
    ("sizes", "slices", "message"),
    [
        ({"data": 4, "fsdp": 8}, 1, r"has 32 devices, v5e:4x4 x 1 has 16"),
        ({"data": 1, "fsdp": 3, "tensor": 4}, 2, r"has 12 devices, v5e:4x4 x 2 has 16"),
        ({"data": 1, "fsdp": 1, "tensor": 16}, 3, r"tensor is 16, no multiple of the slices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, slices, message):
    target = Slice("v5e:4x4", CHIPS["v5e"], tuple(range(16)), slices)
    with pytest.raises(TopologyError, match=message):
        slice_mesh(target, sizes)


@pytest.mark.parametrize("name", [name for name in known_topologies() if not name.endswith(("x1", ":8x8x8"))])
def test_every_default_mesh_can_be_laid_out(name):
    """Also where 16 devices are no whole side of a slice; all devices are there once."""
    target = tpu_slice(name)
    count = len(target.devices)
    for tensor in (1, 2):
        fsdp = min(16, count) // tensor
        sizes = {"slice": 1, "data": count // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
        made = slice_mesh(target, sizes)
        assert dict(made.shape) == sizes
        assert sorted(device.id for device in made.devices.flat) == sorted(device.id for device in target.devices)


def test_only_the_first_axis_leaves_a_slice():
    made = slice_mesh(tpu_slice("v5e:4x4", 2), {"slice": 2, "data": 2, "fsdp": 8, "tensor": 1})
    assert [{device.slice_index for device in part.flat} for part in made.devices] == [{0}, {1}]
    whole = slice_mesh(tpu_slice("v5e:4x4", 2), {"slice": 1, "data": 4, "fsdp": 8, "tensor": 1}).devices
    assert [{device.slice_index for device in part.flat} for part in whole[0]] == [{0}, {0}, {1}, {1}]


def test_a_mesh_is_laid_out_as_for_a_run(monkeypatch):
    """What is compiled has its devices where a run on that slice would have them."""
    target = tpu_slice("v6e:8x8")
    monkeypatch.setattr(mesh.jax, "devices", lambda: list(target.devices))
    monkeypatch.setattr(mesh.jax, "device_count", lambda: len(target.devices))
    sizes = {"slice": 1, "data": 4, "fsdp": 16, "tensor": 1}
    assert mesh.make_mesh(MeshConfig(data=-1, fsdp=16)) == slice_mesh(target, sizes)


@pytest.mark.parametrize(
    ("chip", "shape", "links"),
    [
        ("v5e", "2x2", 2),
        ("v5e", "2x4", 2),
        ("v5e", "4x4", 2),  # open at its sides: a corner has two neighbours
        ("v5e", "8x16", 3),
        ("v5e", "16x16", 4),
        ("v5p", "2x2x4", 3),
        ("v5p", "4x4x4", 6),
        ("v6e", "8x8", 2),
    ],
)
def test_a_corner_sends_over_the_links_that_it_has(chip, shape, links):
    of_all = CHIPS[chip].ici_bandwidth
    assert CHIPS[chip].bandwidth_in(shape) == pytest.approx(of_all * links / (2 * len(shape.split("x"))))


def test_clocks_follow_from_the_peak():
    # Known clocks: v5e 1.5 GHz, v5p 1.75 GHz; within the rounding of the published peaks.
    assert CHIPS["v5e"].clock == pytest.approx(1.5e9, rel=5e-3)
    assert CHIPS["v5p"].clock == pytest.approx(1.75e9, rel=5e-3)
    assert chip_of_kind("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of_kind("NVIDIA H200") is None
    assert all(name.partition(":")[0] in CHIPS for name in known_topologies())


@pytest.mark.parametrize("chip", [chip for chip in CHIPS.values() if chip.shapes], ids=lambda chip: chip.name)
def test_a_chip_has_the_memory_that_the_compiler_gives_a_program(chip):
    device = tpu_slice(f"{chip.name}:{chip.shapes[0]}").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((int(chip.hbm_bytes) // 4096, 1024), jnp.float32, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x + 1).lower(large).compile()
    limit = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(refused.value))
    assert limit is not None and float(limit[1]) == chip.hbm_gib
