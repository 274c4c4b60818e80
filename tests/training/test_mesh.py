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
    """Pretend that there are n devices: the sizes of the mesh that would be made."""

    def pretend(n: int):
        monkeypatch.setattr(module.jax, "device_count", lambda: n)
        monkeypatch.setattr(module, "mesh_over", lambda slices, sizes: sizes)

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
        (8, {"fsdp": 3}, "fsdp=3 x mesh.tensor=1 does not come to the 8 .*: make mesh.fsdp a divisor of 8$"),
        (8, {"fsdp": 2, "tensor": 3}, "make mesh.fsdp x mesh.tensor a divisor of 8$"),
        (8, {"data": 4}, "mesh.data=4 .* does not come to the 8 devices that there are: set mesh.data to -1$"),
        (8, {"data": 16}, "set mesh.data to -1$"),
        (8, {"data": 1, "fsdp": 16}, "set mesh.fsdp to -1$"),  # no size of mesh.data makes up for it
        (8, {"data": 2, "fsdp": 3, "tensor": 5}, "make mesh.data x mesh.fsdp x mesh.tensor a divisor of 8$"),
        (8, {"fsdp": -1}, "mesh.data and mesh.fsdp are -1: one of them takes .*, give the other a number"),
        (8, {"fsdp": 0}, "mesh.fsdp is 0: give 1 or more, or -1"),
        (8, {"tensor": -2}, "mesh.tensor is -2: give 1 or more, or -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(devices, n, asked, message):
    devices(n)
    with pytest.raises(ValueError, match=message) as caught:
        make_mesh(MeshConfig(**asked))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("slices", "asked", "got"),
    [
        (2, {}, (2, 16, 1, 1)),  # no setting says how many there are
        (2, {"fsdp": 4, "tensor": 2}, (2, 2, 4, 2)),
        (2, {"data": 1, "fsdp": -1}, (2, 1, 16, 1)),
        (2, {"slice": 2, "data": 1, "fsdp": 16}, (2, 1, 16, 1)),
        (1, {"slice": 1}, (1, 32, 1, 1)),
        (None, {"slice": 2}, (2, 16, 1, 1)),  # a platform that knows of none
        (None, {}, (1, 32, 1, 1)),
    ],
)
def test_a_mesh_has_the_slices_that_there_are(slices, asked, got):
    assert mesh_sizes(MeshConfig(**asked), 32, slices) == got


@pytest.mark.parametrize(
    ("slices", "asked", "message"),
    [
        (2, {"slice": 1}, "mesh.slice is 1, the number of slices is 2: leave it at -1"),
        (1, {"slice": 2}, "mesh.slice is 2, the number of slices is 1: leave it at -1"),
        (2, {"data": 1, "fsdp": 32}, "set mesh.fsdp to -1"),
        (2, {"fsdp": 32}, "make mesh.slice x mesh.fsdp a divisor of 32"),
    ],
)
def test_slices_are_not_cut(slices, asked, message):
    with pytest.raises(ValueError, match=message):
        mesh_sizes(MeshConfig(**asked), 32, slices)


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
