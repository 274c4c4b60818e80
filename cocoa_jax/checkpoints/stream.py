"""A backbone in the form of a trained stage, written and read one array at a time."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from cocoa_jax.checkpoints.causes import lacks_room, root_cause
from cocoa_jax.checkpoints.contents import checksum_of, mismatches, sealed
from cocoa_jax.checkpoints.errors import CheckpointError, DamagedCheckpointError
from cocoa_jax.checkpoints.hub_layout import Tree, raise_problems
from cocoa_jax.checkpoints.orbax import newest_good, steps_folder
from cocoa_jax.checkpoints.reading import TREES, load_items, read_records, stage_context
from cocoa_jax.checkpoints.safetensors_file import Done

_STATE = "state"  # what Orbax calls a tree that is saved by itself


def save_params(
    stage_dir: str | Path,
    leaves: Iterable[tuple[str, np.ndarray]],
    metadata: dict[str, Any],
    done: Done = lambda count: None,
) -> None:
    """Write step 0 of a stage that holds a backbone and nothing else, while at most two of its arrays are in memory.

    An array is written while the next one is being made. The folder must be nobody else's: it is not atomic.

    Args:
        leaves: dotted path and array; they are not changed afterwards.
        metadata: what this stage is (JSON).
        done: hears of the bytes of every array that is written.

    Raises:
        CheckpointError: the disk does not take it.
    """
    folder = steps_folder(stage_dir)
    folder.mkdir(parents=True)
    weights, step = folder / "weights", folder / "0"
    contents: dict[str, Any] = {}
    pending: list[tuple[Any, int]] = []  # at most one

    def finish() -> None:
        for writing, size in pending:
            writing.result()
            done(size)
        pending.clear()

    for path, leaf in leaves:
        with _errors_of(folder):
            finish()
            with _streaming():
                pending.append((ocp.partial.save_async(weights, unflatten_dict({path: leaf}, sep=".")), leaf.nbytes))
        what = {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "checksum": checksum_of(leaf)}
        contents[path.replace(".", "/")] = what
        del leaf
    found = {name: contents if name == "params" else {} for name in TREES}
    with _errors_of(folder):
        finish()
        with _streaming():
            ocp.partial.finalize(weights)
        with stage_context():
            ocp.save_checkpointables(step, sealed({"loop": {"step": 0}, "metadata": metadata, "contents": found}))
    # A partial save holds one tree of a fixed name; beside the records it is what a stage calls its params.
    (weights / _STATE).rename(step / "params")
    shutil.rmtree(weights)


@contextmanager
def _errors_of(folder: epath.Path) -> Iterator[None]:
    """Whatever goes wrong while Orbax writes is one line: it, TensorStore and JSON each raise their own."""
    try:
        yield
    except Exception as error:
        remedy = "make room" if lacks_room(error) else "remove the cause"
        reason = f"{folder} cannot be written ({root_cause(error)}): {remedy} and start again"
        raise CheckpointError(reason) from error


def _streaming() -> ocp.Context:
    context = ocp.Context()
    # Random bits do not compress, and the arrays are not touched while they are written.
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    return context


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """An array of a checkpoint that is read, and compared with its checksum, when numpy asks for it."""

    step: epath.Path
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    checksum: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        like = np.broadcast_to(np.zeros((), self.dtype), self.shape)  # a description: it takes no memory
        read = load_items(self.step, {"params": unflatten_dict({self.path: like}, sep=".")}, part=True)
        value = flatten_dict(read["params"], sep=".")[self.path]
        if checksum_of(value) != self.checksum:
            raise DamagedCheckpointError(f"{self.step} is damaged: other bytes than were saved in params {self.path}")
        return value


def with_newest(stage_dir: str | Path, abstract: Tree, use: Callable[[dict[str, Any]], None]) -> None:
    """``use`` the backbone of a stage's newest step, or of the one before it where that turns out to be damaged.

    Args:
        abstract: see ``stored_params``.
        use: takes a tree of ``StoredLeaf``.

    Raises:
        CheckpointError: all steps are damaged, or one holds other arrays than those described.
    """
    newest_good(steps_folder(stage_dir), lambda step: use(stored_params(step, abstract)))


def stored_params(step: epath.Path, abstract: Tree) -> dict[str, Any]:
    """The backbone of one step as a tree of ``StoredLeaf``.

    Args:
        abstract: the shapes that the backbone must have; dtypes are those of the checkpoint.

    Raises:
        CheckpointError: it holds other arrays than those described: all differences; or it is damaged.
    """
    contents = read_records(step)["contents"]["params"]
    raise_problems(f"{step} does not fit its config.json", mismatches("params", abstract, contents, same_dtype=False))
    return unflatten_dict({path: _stored(step, path, contents) for path in flatten_dict(abstract, sep=".")}, sep=".")


def _stored(step: epath.Path, path: str, contents: Mapping[str, Any]) -> StoredLeaf:
    what = contents[path.replace(".", "/")]
    return StoredLeaf(step, path, tuple(what["shape"]), np.dtype(jnp.dtype(what["dtype"])), what["checksum"])
