"""Run in a process of its own by test_contract: attention divided over eight virtual devices equals the reference."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cocoa_jax.attention import blockwise, reference
from cocoa_jax.attention.divide import divided
from cocoa_jax.attention.spans import Spans
from cocoa_jax.attention.tiles import Blocks

B, T, N, K, H = 4, 40, 8, 2, 8
tiled = partial(blockwise.attend, cut=blockwise.Cut(Blocks(16, 8), 1, 2))


def gradients(attend, weights):
    return jax.grad(lambda q, k, v, spans: jnp.sum(attend(q, k, v, spans, 0.3) * weights), (0, 1, 2))


def same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # sums in another order


def main() -> None:
    rng = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.float32) for n in (N, K, K, N))
    start = rng.integers(0, T - 5, (B, T)).astype(np.int32)
    spans = Spans(jnp.asarray(start), jnp.asarray(start + rng.integers(0, 9, (B, T)).astype(np.int32)))
    want = gradients(reference.attend, weights)(q, k, v, spans)

    # Rows and heads over the mesh in use; in the first one more devices than key heads.
    for sizes in ((2, 1, 4), (2, 2, 2)):
        mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            step = jax.jit(gradients(divided(tiled), weights))
            program = step.lower(q, k, v, spans).compile().as_text()
            same(step(q, k, v, spans), want)
        assert "all-gather" not in program, sizes  # nobody fetches another device's rows

    # A shard_map of the caller, with the checks of varying axes on: all divided, and rows that every device repeats.
    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    for rows in ("rows", None):
        heads = P(rows, None, "heads")
        over = jax.shard_map(
            lambda q, k, v, spans: tiled(q, k, v, spans, 0.3),
            mesh=mesh,
            in_specs=(heads, heads, heads, P(rows)),
            out_specs=heads,
        )
        same(jax.jit(gradients(lambda *x, over=over: over(*x[:4]), weights))(q, k, v, spans), want)


main()
