"""Run in two processes by test_hosts: they meet, lay rows out, save, read, and stop together; or one dies or fails."""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from cocoa_jax import cli
from cocoa_jax.checkpoints.orbax import StageCheckpoints
from cocoa_jax.commands.command import Command
from cocoa_jax.config import DistributedConfig, MeshConfig, SettingsError
from cocoa_jax.training import agreement, hosts, loop
from cocoa_jax.training.mesh import AXES, make_mesh, rows_sharding
from cocoa_jax.training.place import place

ROWS, SLOTS = 16, 2


def found_where_planned(mesh) -> bool:
    """Whether every example of a planned batch is found in its place on the mesh."""
    share = hosts.row_share(mesh)
    slot = np.arange(ROWS * SLOTS, dtype=np.int32).reshape(ROWS, SLOTS, 1)  # every slot holds its own number
    example = np.arange(ROWS * SLOTS, dtype=np.int32)[::-1].copy()
    batch = place({"pool": slot[share.of(ROWS)], "example": example}, mesh)
    found = jax.jit(lambda it: jnp.take(it["pool"].reshape(-1), it["example"]))(batch)
    return bool(jax.jit(lambda got: jnp.all(got == example))(found))


def die(victim: str) -> None:
    """Compute together for ever, but for one process, which is killed."""
    hosts.join(DistributedConfig(heartbeat=8))
    rows = place({"pool": np.ones((4, 1, 1)), "example": np.zeros(1, np.int32)}, make_mesh(MeshConfig()))["pool"]
    with hosts.with_peers():
        for step in range(10**6):
            float(jax.jit(jnp.sum)(rows))
            if step == 3 and jax.process_index() == int(victim):
                os.kill(os.getpid(), signal.SIGKILL)


def write_at_the_end() -> None:
    """What process 0 does at its end, for more than twice the heartbeat."""
    if jax.process_index() == 0:
        time.sleep(8)
        sys.stdout.write("written\n")


def disagree(config: object) -> None:
    """Stands for a run whose hosts hold different things."""
    try:
        agreement.check_alike({"seed": jax.process_index()})
    finally:
        write_at_the_end()


def fail(where: str) -> None:
    """An error in one process, in what the other waits for or in its own work, or in both; and slow work at the end."""
    if where == "both":
        loop._train = disagree
        loop.train(
            SimpleNamespace(distributed=DistributedConfig(heartbeat=3), loop=SimpleNamespace(compilation_cache=None))
        )
    hosts.join(DistributedConfig(heartbeat=3))
    first = jax.process_index() == 0

    def wrong() -> None:
        raise SettingsError("was made with other settings")

    with hosts.with_peers(), hosts.ended_together():
        if where == "first":
            hosts.first_alone("folder", wrong)
        if where == "second":
            hosts.first_alone("folder", lambda: None)
            if not first:
                wrong()
        if where == "none":
            write_at_the_end()


def by_command(run: Callable[..., None], *words: str) -> None:
    """As the command line ends with what ``run`` raises."""
    cli.commands = lambda: {"it": Command("about", "example", lambda parser: None, lambda given: run(*words))}
    cli.main(["it"])


def refusals(mesh) -> list[str]:
    """What is said of hosts that hold other settings, and of those that planned another batch; "" where they agree."""
    me, said = jax.process_index(), []
    stats, batch = np.arange(3, dtype=np.int32), {"example": np.arange(4, dtype=np.int32), "rows": np.full(2, me)}
    other = {**batch, "example": batch["example"] + me}
    numbers = [agreement.planned(one, stats, mesh, ()) for one in (batch, other)]
    numbers.append(agreement.planned(batch, stats + me, mesh, ()))
    numbers.append(agreement.planned({**batch, "rows": np.zeros(2 + me)}, stats, mesh, ()))
    asked = [functools.partial(agreement.check_alike, {"seed": 3, "loop": {"steps": 4 + odd}}) for odd in (0, me)]
    asked += [functools.partial(agreement.check_planned, 7, one, mesh) for one in numbers]
    for ask in asked:
        try:
            said.append(ask() or "")
        except SettingsError as error:
            said.append(str(error))
    return said


def main(folder: str) -> None:
    hosts.join(DistributedConfig(heartbeat=30))
    done = []
    hosts.first_alone("folder", lambda: done.append(os.mkdir(folder)))
    one_after_another = make_mesh(MeshConfig(fsdp=2))
    pairs = np.array(jax.devices()).reshape(2, 2, 2).transpose(1, 0, 2).reshape(1, 4, 2, 1)
    mixed = jax.sharding.Mesh(pairs, AXES)
    tree = {"kernel": jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8), rows_sharding(one_after_another))}
    wanted = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)}
    with StageCheckpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, params=tree, head={}, optimizer={}, loop={}, metadata={}, wait=True)
        restored = checkpoints.restore(2, wanted)
        same = bool(jax.jit(lambda a, b: jnp.all(a == b))(restored.params["kernel"], tree["kernel"]))
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    stop = next((step for step in range(200) if time.sleep(0.05) or hosts.stop_agreed(step)), None)
    found = [found_where_planned(one_after_another), found_where_planned(mixed)]
    blocks = hosts.row_share(mixed).blocks
    said = refusals(mixed)
    told = {
        "said": said,
        "made": len(done),
        "found": found,
        "blocks": blocks,
        "step": restored.step,
        "same": same,
        "stop": stop,
    }
    sys.stdout.write("told " + json.dumps(told) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "die":
        by_command(die, sys.argv[2])
    elif sys.argv[1] == "fail":
        by_command(fail, *sys.argv[2:])
    else:
        main(sys.argv[1])
