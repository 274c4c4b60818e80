"""One checkpoint as it is read: all of its parts, or what is damaged in it; by all processes of a run alike."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from cocoa_jax.checkpoints.causes import STATUS, chain, passes, root_cause
from cocoa_jax.checkpoints.contents import Contents, Tree, checksums, flat, is_whole, mismatches
from cocoa_jax.checkpoints.errors import CheckpointError, DamagedCheckpointError, UnavailableCheckpointError

TREES = ("params", "adapter", "head", "optimizer")
RECORDS = ("loop", "metadata", "contents")

# What Orbax, TensorStore and JSON raise of files that are missing, cut short or changed. Exact types: those of a
# network, of credentials and of a disk derive from some of these.
_OF_DAMAGE = {Exception, FileNotFoundError, NotADirectoryError, StopIteration, json.JSONDecodeError}
_OF_DAMAGE |= {ValueError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError}
_STATUS_OF_DAMAGE = {"DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}
_WORSE = (DamagedCheckpointError, UnavailableCheckpointError, CheckpointError)  # each before what it derives from
_AGAIN = "it may be whole, remove the cause and give the same command again"


def read_checked(
    path: epath.Path, abstract: Mapping[str, Tree], *, same_dtype: bool
) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Trees and records of one checkpoint, checked against ``abstract`` before and against checksums after."""
    records = _together(path, dict.fromkeys(RECORDS))
    problems = []
    try:
        for name, tree in abstract.items():
            problems += mismatches(name, tree, records["contents"][name], same_dtype=same_dtype)
    except (KeyError, TypeError, AttributeError) as error:  # of records without a checksum
        raise DamagedCheckpointError(f"{path} is damaged: its contents lack {root_cause(error)}") from error
    if problems:
        raise CheckpointError("\n  ".join([f"{path} does not fit ({len(problems)} differences):", *problems]))
    stored = {name: _as_stored(tree, records["contents"][name]) for name, tree in abstract.items()}
    full = {name: tree for name, tree in stored.items() if jax.tree.leaves(tree)}
    trees = {**stored, **(_together(path, full) if full else {})}
    changed = [
        f"{name}/{key}"
        for name, tree in full.items()
        for (key, _), checksum in zip(flat(tree), checksums(trees[name]), strict=True)
        if records["contents"][name][key]["checksum"] != checksum
    ]
    if changed:
        raise DamagedCheckpointError(f"{path} is damaged: other bytes than were saved in {', '.join(changed)}")
    cast = {name: jax.tree.map(lambda x, want: x.astype(want.dtype), trees[name], abstract[name]) for name in abstract}
    return cast, records


def _together(path: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """``load_items``, which fails for all processes where it fails for one: each reads a part of its own.

    It is damage for all of them only where each that failed found damage, and passes only where it does for each.
    """
    if jax.process_count() == 1:
        return load_items(path, wanted)
    found: dict[str, Any] = {}
    failure: CheckpointError | None = None
    try:
        found = load_items(path, wanted)
    except CheckpointError as error:
        failure = error
    mine = 0 if failure is None else 1 + next(at for at, kind in enumerate(_WORSE) if isinstance(failure, kind))
    all_ = multihost_utils.process_allgather(np.array(mine))
    worst = int(all_.max())
    if failure is not None and mine == worst:
        raise failure
    failed = np.flatnonzero(all_ == worst).tolist()
    if worst == 1:
        raise DamagedCheckpointError(f"{path} is damaged: processes {failed} could not read it")
    if worst:
        raise _WORSE[worst - 1](f"{path} cannot be read by processes {failed}, which say why: {_AGAIN}")
    return found


def read_records(path: epath.Path) -> dict[str, Any]:
    return load_items(path, dict.fromkeys(RECORDS))


def load_items(path: epath.Path, wanted: Mapping[str, Any], *, part: bool = False) -> dict[str, Any]:
    """Items of one checkpoint as Orbax reads them.

    Args:
        part: whether the trees may name some of the stored arrays only.

    Raises:
        DamagedCheckpointError: files are missing, cut short or changed.
        UnavailableCheckpointError: a network or a service fails: the checkpoint may be whole.
        CheckpointError: anything else, such as permissions or memory: it may be whole too.
    """
    context = ocp.Context(stage_context())
    context.pytree.loading.partial_load = part
    try:
        with context:
            found = ocp.load_checkpointables(path, dict(wanted))
    except Exception as error:  # Orbax, TensorStore and JSON each raise their own
        if _is_damage(error):
            raise DamagedCheckpointError(f"{path} is damaged: {root_cause(error)}") from error
        kind = UnavailableCheckpointError if passes(error) else CheckpointError
        raise kind(f"{path} cannot be read now ({root_cause(error)}): {_AGAIN}") from error
    if set(RECORDS) <= set(wanted) and not is_whole(found):
        raise DamagedCheckpointError(f"{path} is damaged: other records than were saved")
    return found


def _is_damage(error: BaseException) -> bool:
    """Whether all that led to an error is of a kind that damaged files cause."""
    for link in chain(error):
        status = STATUS.match(str(link))
        if status is not None and status[0] not in _STATUS_OF_DAMAGE:
            return False
        if type(link) not in _OF_DAMAGE and not type(link).__module__.startswith("orbax."):
            return False
    return True


def _as_stored(tree: Tree, contents: Contents) -> Tree:
    """``tree`` with the dtypes that were saved, so that checksums hold, and with a place for every array."""

    def describe(key: str, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding if leaf.sharding is not None else SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(contents[key]["dtype"]), sharding=sharding)

    leaves = [describe(key, leaf) for key, leaf in flat(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


@functools.cache
def stage_context() -> ocp.Context:
    # Named handlers: by itself Orbax takes an optimizer state without arrays for JSON.
    registry = ocp.handlers.local_registry()
    for name in TREES:
        registry.add(ocp.handlers.PyTreeHandler, checkpointable_name=name)
    for name in RECORDS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context
