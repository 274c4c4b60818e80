"""Bytes over the interconnect: ring formulas, groups in every spelling, and a program on eight virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cocoa_jax.profiling.collectives import axes_of, by_axis, collectives, ring_bytes, seconds_sent
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.topology import slice_mesh, tpu_slice

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
KIB = 1024.0


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 3.0),  # 4 KiB gathered from 4: each sends its 1 KiB on 3 times
        ("reduce-scatter", 12.0),  # 4 KiB is one part
        ("all-reduce", 6.0),
        ("all-reduce-scatter", 3.0),
        ("all-to-all", 3.0),
        ("collective-permute", 4.0),
    ],
)
def test_ring_formulas(kind, sent):
    assert ring_bytes(kind, 4 * KIB, 4) == sent * KIB


def module(attributes: str, kind: str = "all-reduce", shape: str = "f32[256]{0}") -> Module:
    return Module(
        f"HloModule x\n\nENTRY %main (p: f32[256]) -> f32[256] {{\n  %p = f32[256]{{0}} parameter(0)\n"
        f"  ROOT %r = {shape} {kind}(%p), channel_id=1, {attributes}\n}}\n"
    )


@pytest.mark.parametrize(
    ("groups", "axis", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "fsdp", 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("replica_groups=[2,4]<=[8]", "fsdp", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data", 2),
        ("replica_groups=[1,8]<=[8]", "data+fsdp", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "fsdp", 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "data", 2),
        ("replica_groups={{0,3},{1,2},{4,7},{5,6}}", "other", 2),
        ("replica_groups={}", "data+fsdp", 8),
    ],
)
def test_groups_are_named_by_the_mesh_axes(groups, axis, size):
    (found,) = collectives(module(groups), MESH)
    assert (found.axis, found.group, found.payload) == (axis, size, KIB)
    assert found.wire == ring_bytes("all-reduce", KIB, size)


def test_a_permutation_belongs_to_the_axis_that_it_turns():
    (found,) = collectives(module("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", "collective-permute"), MESH)
    assert (found.axis, found.wire) == ("fsdp", KIB)


def test_a_start_shows_its_input_too():
    start = module("replica_groups=[2,4]<=[8]", "all-gather-start", "(f32[64]{0}, f32[256]{0})")
    assert collectives(start, MESH)[0].payload == KIB


def test_one_that_goes_on_beside_other_work_counts_where_it_starts_and_its_copies_count_too():
    """The compiler takes a turn out of a loop as a copy, which keeps the channel of the one that stays."""
    gather = "all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8]"
    body = "(p: f32[64]) -> f32[256] {\n  %p = f32[64]{0} parameter(0)\n"
    inner = "".join(
        f"%{name} {body}  ROOT %g.{at} = f32[256]{{0}} {gather}\n}}\n\n"
        for at, name in enumerate(("fused_computation.1", "async_collective_fusion.2", "fused_computation.3"))
    )
    parts = (("async-collective-start", 1), ("fusion", 2), ("async-collective-done", 3))
    called = [f"async_collective_fusion.{at}" if at == 2 else f"fused_computation.{at}" for _, at in parts]
    loop = "".join(
        f"  {'ROOT ' * (at == 3)}%{name}.{at} = f32[256]{{0}} fusion(%p), kind=kCustom, calls=%{calls}\n"
        for (name, at), calls in zip(parts, called, strict=True)
    )
    found = collectives(
        Module(
            f"HloModule x\n\n{inner}%body {body}{loop}}}\n\n%test {body}  ROOT %t = pred[] constant(true)\n}}\n\n"
            f"ENTRY %main {body}  %copy = f32[256]{{0}} {gather}\n  ROOT %w = f32[256]{{0}} while(%p), "
            'condition=%test, body=%body, backend_config={"known_trip_count":{"n":"27"}}\n}\n'
        ),
        MESH,
    )
    assert sorted(one.runs for one in found) == [1, 27]
    assert sum(one.wire for one in found) == 28 * ring_bytes("all-gather", KIB, 4)


def test_no_axis_fits_uneven_groups():
    assert axes_of(frozenset({frozenset({0, 1, 2}), frozenset({3, 4, 5, 6, 7})}), MESH) == "other"


def test_what_two_slices_send_each_other():
    """The compiler writes the program of one slice, and what goes to the other as a send by way of the host."""
    sizes = {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1}
    mesh = slice_mesh(tpu_slice("v5e:2x2", 2), sizes)

    def found(function, out):
        x = jax.ShapeDtypeStruct((1024, 256), "float32", sharding=NamedSharding(mesh, PartitionSpec(("slice", "fsdp"))))
        text = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(x).compile().as_text()
        return {(kind, axis): sent for kind, axis, _, _, sent in by_axis(collectives(Module(text), sizes))}

    # 256 x 256 numbers are summed in each slice, of which a device then has 64 KiB, and these over the slices.
    summed = found(lambda x: x.T @ x, PartitionSpec("fsdp"))
    assert summed == {
        ("all-reduce-scatter", "fsdp"): ring_bytes("all-reduce-scatter", 256 * KIB, 4),
        ("all-reduce", "slice"): ring_bytes("all-reduce", 64 * KIB, 2),
    }
    # Rows that lie on both come to lie on each: all of them go to the other slice.
    gathered = found(lambda x: x * 2, PartitionSpec("fsdp"))
    assert gathered["all-gather", "slice"] == ring_bytes("all-gather", 2 * 128 * KIB, 2)


def test_seconds_inside_of_a_slice_and_between_slices():
    sent = [
        ("all-gather", "fsdp", 1, 1, 300.0),
        ("all-reduce", "slice", 1, 1, 40.0),
        ("all-to-all", "slice+data", 1, 1, 8.0),
    ]
    assert seconds_sent(sent, 100.0, 10.0) == (3.0, 4.8)


PROGRAM = """
import json, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from cocoa_jax.profiling.collectives import by_axis, collectives
from cocoa_jax.profiling.hlo import Module
mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
def shard(x):  # float32 [1, 256] on each of eight devices
    def turn(c, _):
        g = jax.lax.all_gather(c, "fsdp", axis=0, tiled=True)
        c = jax.lax.psum_scatter(jnp.sin(g), "fsdp", scatter_dimension=0, tiled=True)
        return c + jax.lax.ppermute(c, "data", [(0, 1), (1, 0)]), None
    x = jax.lax.scan(turn, x, None, length=3)[0]
    return jax.lax.psum(x, ("data", "fsdp"))
f = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(), check_vma=False))
text = f.lower(jax.ShapeDtypeStruct((8, 256), jnp.float32)).compile().as_text()
print(json.dumps(by_axis(collectives(Module(text), dict(mesh.shape)))))
"""


def test_a_program_on_eight_virtual_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **flags}, capture_output=True, text=True, check=True
    )
    found = {(kind, axis): (runs, sent) for kind, axis, _, runs, sent in json.loads(done.stdout.splitlines()[-1])}
    # Three turns of the loop each; 1 KiB a device is the part, 4 KiB the whole.
    assert found["all-gather", "fsdp"] == (3, 3 * ring_bytes("all-gather", 4 * KIB, 4))
    assert found["reduce-scatter", "fsdp"] == (3, 3 * ring_bytes("reduce-scatter", KIB, 4))
    assert found["collective-permute", "data"] == (3, 3 * KIB)
    assert found["all-reduce", "data+fsdp"] == (1, ring_bytes("all-reduce", KIB, 8))


def test_sums_are_the_largest_first():
    one, two = (collectives(module("replica_groups=[2,4]<=[8]", kind), MESH) for kind in ("all-to-all", "all-reduce"))
    assert [row[0] for row in by_axis([*one, *two])] == ["all-reduce", "all-to-all"]
