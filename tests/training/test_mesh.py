"""Meshes: sizes that fit the machine, and clear words about those that do not. The machine here has one device."""

import jax
import pytest

from cocoa_jax.training import mesh as module
from cocoa_jax.training.mesh import (
    MeshConfig,
    batch_shards,
    make_mesh,
    mesh_here,
    mesh_sizes,
    replicated,
    rows_sharding,
)


@pytest.fixture
def devices(monkeypatch):
    """Pretend that there are n devices: what ``jax.make_mesh`` would be asked for."""

    def pretend(n: int):
        monkeypatch.setattr(module.jax, "device_count", lambda: n)
        monkeypatch.setattr(
            module.jax, "make_mesh", lambda sizes, names, axis_types: dict(zip(names, sizes, strict=True))
        )

    return pretend


@pytest.mark.parametrize(
    ("n", "asked", "got"),
    [
        (1, {}, (1, 1, 1, 1)),
        (8, {}, (1, 8, 1, 1)),
        (8, {"fsdp": 2, "tensor": 2}, (1, 2, 2, 2)),
        (8, {"data": 1, "fsdp": -1}, (1, 1, 8, 1)),
        (8, {"data": 2, "fsdp": 2, "tensor": -1}, (1, 2, 2, 2)),
        (8, {"data": 2, "fsdp": 4}, (1, 2, 4, 1)),
        (8, {"slice": 2, "fsdp": 4}, (2, 1, 4, 1)),
    ],
)
def test_sizes(devices, n, asked, got):
    devices(n)
    assert tuple(make_mesh(MeshConfig(**asked)).values()) == got


@pytest.mark.parametrize(
    ("n", "asked", "message"),
    [
        (8, {"fsdp": 3}, "asks for 3 devices at least, there are 8"),
        (8, {"data": 4}, "asks for 4 devices at least, there are 8"),
        (8, {"data": 16}, "asks for 16 devices at least, there are 8"),
        (8, {"fsdp": -1}, "at most one is -1"),
        (8, {"fsdp": 0}, "sizes are positive"),
        (8, {"tensor": -2}, "sizes are positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(devices, n, asked, message):
    devices(n)
    with pytest.raises(ValueError, match=message) as caught:
        make_mesh(MeshConfig(**asked))
    assert "\n" not in str(caught.value)


def test_slices_are_not_cut():
    assert mesh_sizes(MeshConfig(slice=2, fsdp=16), 32, 2) == (2, 1, 16, 1)
    with pytest.raises(ValueError, match=r"on 2 slices: set mesh\.slice to 2"):
        mesh_sizes(MeshConfig(fsdp=32), 32, 2)


def test_shardings_of_a_real_mesh():
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == ("slice", "data", "fsdp", "tensor") and batch_shards(mesh) == 1
    assert rows_sharding(mesh).spec == jax.sharding.PartitionSpec(("slice", "data", "fsdp"))
    assert replicated(mesh).is_fully_replicated


def test_a_mesh_of_another_machine_becomes_one_that_shares_everything(devices):
    """Sixteen chips trained what eight, or one, are to read."""
    trained = MeshConfig(data=-1, fsdp=16)
    for count, found in ((32, trained), (8, MeshConfig(data=1, fsdp=-1)), (1, MeshConfig(data=1, fsdp=-1))):
        devices(count)
        assert mesh_here(trained) == found
    assert mesh_here(MeshConfig()) == MeshConfig()
