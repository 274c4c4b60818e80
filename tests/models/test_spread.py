"""Rows of a table, and where their gradient is added up."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cocoa_jax.models.spread import look_up
from cocoa_jax.profiling.collectives import collectives
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.topology import slice_mesh, tpu_slice


def test_a_row_that_is_read_twice_gets_both_gradients():
    table, ids = jnp.arange(12.0).reshape(4, 3), jnp.array([[0, 2, 2], [3, 2, 0]])
    rows, pull = jax.vjp(lambda table: look_up(table, ids), table)
    np.testing.assert_array_equal(rows, np.asarray(table)[ids])
    gradient = np.arange(1.0, 19.0, dtype=np.float32).reshape(2, 3, 3)
    wanted = np.zeros((4, 3), np.float32)
    np.add.at(wanted, np.asarray(ids), gradient)
    np.testing.assert_array_equal(pull(jnp.asarray(gradient))[0], wanted)


def test_no_device_adds_up_or_sends_a_whole_table():
    """Where a batch has more tokens than the table rows, as on a large slice."""
    V, D, sizes = 2048, 512, {"slice": 1, "data": 2, "fsdp": 4, "tensor": 1}
    mesh = slice_mesh(tpu_slice("v5e:2x4", 1), sizes)
    by_width, by_rows = (NamedSharding(mesh, spec) for spec in (P("tensor", "fsdp"), P(("data", "fsdp"))))
    table = jax.ShapeDtypeStruct((V, D), jnp.float32, sharding=by_width)
    ids = jax.ShapeDtypeStruct((64, 256), jnp.int32, sharding=by_rows)
    states = jax.ShapeDtypeStruct((64, 256, D), jnp.float32, sharding=by_rows)

    def sent(read):
        def gradient(table, ids, states):
            return jax.vjp(lambda table: read(table, ids), table)[1](states)[0]

        program = jax.jit(gradient, out_shardings=by_width)
        with jax.set_mesh(mesh):
            module = Module(program.lower(table, ids, states).compile().as_text())
        return {(one.kind, one.axis): one.payload for one in collectives(module, sizes)}

    part = V * D * 4 / sizes["fsdp"]
    own = sent(look_up)
    assert own.pop(("all-reduce", "data")) == part
    assert max(own.values()) <= 32 * 256 * D * 4 / sizes["fsdp"]  # rows of gradients, each device its part of the width
    # Once the compiler does so by itself, the function can go.
    left_alone = sent(lambda table, ids: jnp.take(table, ids, axis=0))
    assert max(left_alone.values()) >= V * D * 4
