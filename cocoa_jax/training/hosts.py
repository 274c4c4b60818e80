"""The processes of one run, one a host: how they meet, how they notice that one is gone, and who holds which rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import multihost

from cocoa_jax.checkpoints.causes import from_network
from cocoa_jax.checkpoints.errors import UnavailableCheckpointError
from cocoa_jax.config import DistributedConfig, SettingsError
from cocoa_jax.data.packing import RowShare
from cocoa_jax.training.mesh import batch_shards, rows_sharding

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# What is wrong with the program itself, and would be so again: all other errors can come from another process.
OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
_LONGEST = 3_600_000  # milliseconds that processes which are alive wait for each other: files of all sizes are read
_MEETINGS = itertools.count()  # each has a name of its own, and all processes come to all of them in turn


class PeerLost(Exception):
    """Another process of the run, or a device, is gone; the same command goes on from the last checkpoint."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """How one process finds the others; None is left to JAX, which knows TPU pods, Slurm and Open MPI."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def peers(config: DistributedConfig, environment: Mapping[str, str]) -> Peers | None:
    """How this process is to join others; None where it is alone.

    Settings come before the environment, which is what tells the processes of one run apart.

    Raises:
        SettingsError: some of coordinator, processes and process, but not all of them.
    """
    if config.mode == "off":
        return None
    given: dict[str, str | int | None] = {
        "distributed.coordinator or " + COORDINATOR: config.coordinator or environment.get(COORDINATOR),
        "distributed.processes or " + COUNT: config.processes or _number(environment, COUNT),
        "distributed.process or " + INDEX: _number(environment, INDEX) if config.process is None else config.process,
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        coordinator, processes, process = given.values()
        return Peers(str(coordinator), int(processes or 0), int(process or 0))
    if len(missing) < len(given):
        raise SettingsError(f"processes find each other by three settings, missing {missing}: give all or none")
    return Peers() if config.mode == "on" or _in_a_pod(environment) else None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is not None and not value.isdigit():
        raise SettingsError(f"{name} is {value!r}: give a whole number from 0")
    return None if value is None else int(value)


def _in_a_pod(environment: Mapping[str, str]) -> bool:
    """Whether Google's machinery says that this TPU host is one of several, by GKE's and Multislice's variables."""
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "") or environment.get("MEGASCALE_NUM_SLICES", "1") != "1"


def join(config: DistributedConfig) -> None:
    """Meet the other processes of the run, before anything asks JAX for its devices; alone, this does nothing.

    From here on a process that sends no sign of life for ``config.heartbeat`` seconds ends all the others (SIGABRT),
    and one that ends early does so after the same time: see ``ended_together`` and, where it ends alone, ``leave``.

    Raises:
        SettingsError: settings that contradict each other, or hosts of a pod that were not told to join.
    """
    found = peers(config, os.environ)
    if found is not None and not jax.distributed.is_initialized():
        jax.distributed.initialize(
            found.coordinator,
            found.processes,
            found.process,
            initialization_timeout=config.start,
            heartbeat_timeout_seconds=config.heartbeat,
            shutdown_timeout_seconds=config.heartbeat,
        )
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise SettingsError(f"this is one of {jax.process_count()} hosts of a pod: give --distributed.mode=on")


@contextmanager
def with_peers() -> Iterator[None]:
    """What a run of several processes computes together.

    A collective that fails because a process died may end this one before the missing sign of life does.

    Raises:
        PeerLost: in place of an error of JAX's runtime that the program itself is not the cause of.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        code, _, _ = str(error).partition(":")
        if jax.process_count() == 1 or code in OWN_ERRORS:
            raise
        what = str(error).strip().splitlines()[0]
        raise PeerLost(f"another process or a device is gone ({what}): the same command continues") from error


def is_first() -> bool:
    """Whether this process is the one that writes for all."""
    return jax.process_index() == 0


def first_alone(name: str, work: Callable[[], object]) -> None:
    """Let process 0 do something that the others must find done; they wait for it, and end with it where it fails.

    Raises:
        SettingsError: on the others, what ``work`` raises on process 0; PeerLost where that ends by itself.
    """
    if jax.process_count() == 1:
        work()
        return
    failure: Exception | None = None
    if is_first():
        try:
            work()
        except Exception as error:
            failure = error
    meet()
    status = 0 if failure is None else 1 + again(failure)
    status = int(multihost_utils.broadcast_one_to_all(np.int32(status)))
    if failure is not None:
        raise failure
    if status:
        raise (SettingsError, PeerLost)[status - 1](f"process 0 could not go on, and says why ({name})")


def again(error: BaseException) -> bool:
    """Whether the same command may go on after an error: a process is gone, or a network or a service failed."""
    return isinstance(error, PeerLost | UnavailableCheckpointError) or from_network(error)


@contextmanager
def ended_together(*alike: type[Exception]) -> Iterator[None]:
    """All processes leave this at the same time, where it ends for all of them: by itself, or by an error in ``alike``.

    What process 0 does at the end, such as sending logs, may take its time, and JAX kills all (SIGABRT) where one ends
    ``distributed.heartbeat`` seconds before another.
    """
    try:
        yield
    except alike:
        meet()
        raise
    meet()


def meet() -> None:
    """Wait until all processes are here; on their hosts, as a collective of devices does not wait for minutes.

    Alone, this does nothing.
    """
    if jax.process_count() > 1:
        # By JAX's own coordination service, to which Orbax has the public way.
        multihost.get_barrier_sync_fn()(key=f"cocoa meeting {next(_MEETINGS)}", timeout_ms=_LONGEST)


def leave(status: int, told: str = "") -> None:
    """End this process, one of several, with ``status``, at once; alone, this does nothing.

    At its exit JAX would wait for the others, which do not come, and kill it (SIGABRT): launchers would take what stays
    wrong for the loss of a host, and try again and again.

    Args:
        told: what goes to stderr before.
    """
    if not jax.distributed.is_initialized():
        return
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stderr.write(told)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check_shared(folder: Path) -> None:
    """See that all processes read in a folder what process 0 writes there; alone, this does nothing.

    Raises:
        SettingsError: on all of them, naming those that do not.
    """
    if jax.process_count() == 1:
        return
    mark = folder / ".shared"
    meet()  # where this is the first collective, some may come to it long before others
    number = str(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbelow(2**31))))

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(number)

    first_alone("the output is marked", write)
    try:
        seen = mark.read_text() == number
    except OSError:
        seen = False
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(seen)))
    first_alone("the output was looked at", mark.unlink)
    if len(blind):
        raise SettingsError(
            f"processes {blind.tolist()} do not see what process 0 writes in {folder}: give an output on a disk that "
            "all hosts share"
        )


def stop_agreed(step: int) -> bool:
    """Whether a SIGTERM that reached any process stops all of them at this step; each asks at every step, once."""
    return multihost_utils.reached_preemption_sync_point(step)


@functools.cache
def row_share(mesh: Mesh) -> RowShare:
    """The rows of this process: those that its devices hold.

    On a TPU slice the devices of a host need not follow one another along an axis of the mesh, so they may lie apart.

    Raises:
        SettingsError: processes that hold some rows in common, but not all.
    """
    blocks = batch_shards(mesh)
    owned: dict[int, set[int]] = {}
    places: Mapping[Any, tuple[slice, ...]] = rows_sharding(mesh).devices_indices_map((blocks,))
    for device, (rows, *_) in places.items():
        owned.setdefault(device.process_index, set()).add(rows.indices(blocks)[0])
    return _shared({process: tuple(sorted(held)) for process, held in owned.items()}, jax.process_index())


def _shared(owned: Mapping[int, tuple[int, ...]], process: int) -> RowShare:
    parts = sorted(set(owned.values()))
    held = [block for part in parts for block in part]
    if len(set(held)) < len(held) or len({len(part) for part in parts}) > 1:
        raise SettingsError(
            f"hosts hold the blocks {parts} of a batch's rows, which overlap: make mesh.tensor divide the devices of a "
            "host, or be a multiple of them"
        )
    return RowShare(owned[process], len(held))
