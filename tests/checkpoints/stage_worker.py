"""Run in a process of its own by test_orbax: saves or restores a small training state on all devices it has."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from cocoa_jax.checkpoints.orbax import StageCheckpoints


def state(step: int, rows: int = 512) -> dict:
    """Deterministic parameters, head and optimizer state of a step, spread over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    spread, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
    rng = np.random.default_rng(step)
    kernel = jax.device_put(rng.standard_normal((rows, 8)).astype(np.float32), spread)
    params = {"text": {"kernel": kernel, "scale": jax.device_put(jnp.full((3,), step, jnp.bfloat16), whole)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 9))).init(params)
    optimizer = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer)
    return {"params": params, "head": {"out": jax.device_put(rng.standard_normal(5), whole)}, "optimizer": optimizer}


def abstract(trees: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trees)


def save(checkpoints: StageCheckpoints, step: int, trees: dict, wait: bool = True) -> None:
    checkpoints.save(step, **trees, loop={"step": step}, metadata={"stage": "bridge"}, wait=wait)


def main(action: str, folder: str) -> None:
    if action == "save":
        with StageCheckpoints(folder, keep=2) as checkpoints:
            save(checkpoints, 3, state(3))
    elif action == "restore":
        wanted = state(3)
        with StageCheckpoints(folder, keep=2) as checkpoints:
            restored = checkpoints.restore_latest(abstract(wanted))
        assert restored is not None
        for name, tree in wanted.items():
            jax.tree.map(np.testing.assert_array_equal, restored.__dict__[name], tree)
            jax.tree.map(lambda x, y: x.sharding == y.sharding or sys.exit(3), restored.__dict__[name], tree)
    elif action == "save-for-ever":  # the test kills it in the middle of a save
        checkpoints = StageCheckpoints(folder, keep=2)
        for step in range(1, 10**6):
            save(checkpoints, step, state(step, rows=1 << 18), wait=False)
            sys.stdout.write(f"{step}\n")
            sys.stdout.flush()
            time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:])
