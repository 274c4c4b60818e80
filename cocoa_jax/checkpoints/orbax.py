"""The training state of a stage on disk, and what the next stage takes from it.

    STAGE/backbone/             config.json, tokenizer and preprocessor files
    STAGE/checkpoints/<step>/   params, head, optimizer (arrays); loop, metadata, contents (JSON)
    STAGE/base/checkpoints/0/   params of a frozen backbone, once; the steps then hold adapter in the place of params

``contents`` holds dtype, shape and checksum of every array, and one of the records: Orbax itself notices files that are
cut short or missing, but not a byte that has changed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from cocoa_jax.checkpoints.added_tokens import add_to_tokenizer
from cocoa_jax.checkpoints.causes import chain, lacks_room, passes, root_cause
from cocoa_jax.checkpoints.contents import Tree, contents_of, sealed
from cocoa_jax.checkpoints.errors import (
    CheckpointError,
    DamagedCheckpointError,
    MissingCheckpointError,
    UnavailableCheckpointError,
)
from cocoa_jax.checkpoints.huggingface import copy_side_files
from cocoa_jax.checkpoints.places import folder_at, is_folder, is_remote, twin
from cocoa_jax.checkpoints.reading import TREES, read_checked, read_records, stage_context

_BASE = "base"
_log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Restored:
    """One checkpoint, read back: the trees that were asked for (None for the others), and both records."""

    step: int
    params: Tree
    adapter: Tree
    head: Tree
    optimizer: Tree
    loop: dict[str, Any]
    metadata: dict[str, Any]


class StageCheckpoints:
    """The checkpoints of one stage while it trains: saved in the background, atomic, the newest ``keep`` kept.

    A checkpoint appears under its step only when it is whole; what a killed run left unfinished is removed here, so
    only one process (or one group of JAX processes) may hold a stage open at a time.
    """

    def __init__(self, stage_dir: str | Path, keep: int):
        if keep < 1:
            raise CheckpointError(f"keep is {keep}: at least one checkpoint has to be kept")
        self._directory = steps_folder(stage_dir)
        self._damaged: set[int] = set()
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            context=stage_context(),
            preservation_policy=_NewestUndamaged(keep, self._damaged),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps that are on disk, whole, oldest first."""
        return _steps(self._directory)

    def save(
        self,
        step: int,
        *,
        params: Tree,
        head: Tree,
        optimizer: Tree,
        loop: dict[str, Any],
        metadata: dict[str, Any],
        adapter: Tree = None,
        wait: bool = False,
    ) -> None:
        """Save a step in the background; the arrays may be donated as soon as this returns.

        A failure of the save before is raised here, by ``wait`` or by ``close``, see ``wait``.

        Args:
            params: the backbone; empty where an adapter trains on a frozen one, see ``save_base``.
            head: arrays that train beside the backbone; may be empty.
            loop: what the loop continues from (JSON): the step, of which batches are a function.
            metadata: what this stage is (JSON): stage, config, parent, fingerprint of the data.
            adapter: what trains on a frozen backbone, None where there is no such thing.
            wait: return only when the checkpoint is on disk.

        Raises:
            CheckpointError: the step is there already, or a record is not JSON.
        """
        damaged = step in self._damaged
        if step in self.steps() and not damaged:
            raise CheckpointError(f"{self._directory} holds step {step} already: continue from it or remove it")
        trees = {"params": params, "adapter": adapter, "head": head, "optimizer": optimizer}
        contents = {name: contents_of(tree) for name, tree in trees.items()}
        items = {name: tree for name, tree in trees.items() if contents[name]}
        records = {"loop": loop, "metadata": metadata, "contents": contents}
        for name, record in records.items():
            _require_json(name, record)
        self._damaged.discard(step)  # before the save, which asks at its start what to keep after it
        with self._saving():
            self._checkpointer.save_checkpointables_async(step, items | sealed(records), force=True, overwrite=damaged)
        if wait:
            self.wait()

    def restore(self, step: int, abstract: Mapping[str, Tree]) -> Restored:
        """Read one step, every array onto the sharding of its description (the first device where it has none).

        Args:
            abstract: trees of ``jax.ShapeDtypeStruct`` by name: any of params, adapter, head, optimizer.

        Raises:
            DamagedCheckpointError: the step cannot be read back as it was saved.
            CheckpointError: there is no such step, or it holds other arrays than those described.
        """
        self.wait()
        if step not in self.steps():
            raise CheckpointError(f"{self._directory} holds no step {step}, only {self.steps()}")
        trees, records = read_checked(self._directory / str(step), abstract, same_dtype=True)
        found = {name: trees.get(name) for name in TREES}
        return Restored(step=step, **found, loop=records["loop"], metadata=records["metadata"])

    def restore_latest(self, abstract: Mapping[str, Tree]) -> Restored | None:
        """Read the newest step that is not damaged, None where nothing was saved yet; a damaged one is logged.

        Damaged steps are replaced by what is saved from here on.

        Raises:
            DamagedCheckpointError: all steps are.
            CheckpointError: a step cannot be read for another reason, or the newest good one holds other arrays than
                those described.
        """
        self.wait()

        def read(path: epath.Path) -> Restored:
            try:
                return self.restore(int(path.name), abstract)
            except DamagedCheckpointError:
                self._damaged.add(int(path.name))
                raise

        if not self.steps():
            return None
        return newest_good(self._directory, read, "remove them to start again")

    def wait(self) -> None:
        """Return when everything saved so far is on disk.

        Raises:
            CheckpointError: what kept it from it; UnavailableCheckpointError where that is a network or a service.
            JaxRuntimeError: another process of the run is gone.
        """
        with self._saving():
            self._checkpointer.wait()

    def close(self) -> None:
        """``wait``, then release the directory; else as ``wait``."""
        with self._saving():
            try:
                self._checkpointer.wait()  # closing alone says nothing of a save that failed
            finally:
                self._checkpointer.close()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Whatever goes wrong with a save is one line; Orbax, TensorStore and the system each raise their own.

        But for an error of JAX's runtime: Orbax has the processes of a run wait for each other, and one may be gone.
        """
        try:
            yield
        except Exception as error:
            lost = next((link for link in chain(error) if isinstance(link, jax.errors.JaxRuntimeError)), None)
            if lost is not None:
                raise jax.errors.JaxRuntimeError(str(lost)) from error
            again = passes(error)
            kind = UnavailableCheckpointError if again else CheckpointError
            remedy = "" if again else f"{'make room' if lacks_room(error) else 'remove the cause'} and "
            raise kind(
                f"a checkpoint could not be written to {self._directory} ({root_cause(error)}): those before it are "
                f"whole, {remedy}continue by the same command"
            ) from error

    def __enter__(self) -> StageCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.close()
        except (CheckpointError, jax.errors.JaxRuntimeError):
            if kind is None:  # else there is an error already, of which this one is another face
                raise


# ------------------------------------------------------------------------------ what others take from a stage


def load_params(stage_dir: str | Path, abstract_params: Tree) -> Tree:
    """The backbone of a stage's newest good checkpoint, cast to the described dtypes; the optimizer is not read.

    Raises:
        CheckpointError: no checkpoint, none that can be read, or one that holds other arrays than those described.
    """
    return load_trees(stage_dir, {"params": abstract_params})["params"]


def load_trees(stage_dir: str | Path, abstract: Mapping[str, Tree]) -> dict[str, Tree]:
    """Any of params, adapter, head, optimizer, all from the newest checkpoint that is good; else as ``load_params``."""

    def read(step: epath.Path) -> dict[str, Tree]:
        return read_checked(step, abstract, same_dtype=False)[0]

    return newest_good(steps_folder(stage_dir), read)


def read_metadata(stage_dir: str | Path) -> dict[str, Any]:
    """What a stage is, from its newest readable checkpoint: the ``metadata`` that it was saved with.

    Raises:
        CheckpointError: no checkpoint, or none that can be read.
    """
    return _newest_records(stage_dir)["metadata"]


def newest_step(stage_dir: str | Path) -> int:
    """The step of a stage's newest readable checkpoint.

    Raises:
        CheckpointError: no checkpoint, or none that can be read.
    """
    return int(_newest_records(stage_dir)["step"])


def fingerprint(stage_dir: str | Path) -> str:
    """Eight hex digits that tell the backbone in a stage's newest readable checkpoint from any other; fast.

    Raises:
        CheckpointError: no checkpoint, or none that can be read.
    """
    contents = _newest_records(stage_dir)["contents"]
    trained = [contents[name] for name in ("params", "adapter") if contents.get(name)]
    if is_adapted(stage_dir):
        trained.append(_newest_records(base_folder(stage_dir))["contents"]["params"])
    return f"{zlib.crc32(json.dumps(trained, sort_keys=True).encode()):08x}"


def _newest_records(stage_dir: str | Path) -> dict[str, Any]:
    return newest_good(steps_folder(stage_dir), lambda step: {**read_records(step), "step": int(step.name)})


def backbone_folder(stage_dir: str | Path) -> Path:
    """Where a stage keeps the config, tokenizer and preprocessor of its backbone."""
    return folder_at(stage_dir) / "backbone"


def base_folder(stage_dir: str | Path) -> Path:
    """Where a stage that trains an adapter keeps the frozen weights that it started from."""
    return folder_at(stage_dir) / _BASE


def is_adapted(stage_dir: str | Path) -> bool:
    """Whether a stage trains an adapter on a frozen backbone, rather than the backbone itself."""
    return is_folder(base_folder(stage_dir))


def save_base(stage_dir: str | Path, params: Tree) -> None:
    """Write the frozen weights of a stage, whole or not at all; returns when they are on disk."""
    with StageCheckpoints(base_folder(stage_dir), keep=1) as base:
        base.save(0, params=params, head={}, optimizer={}, loop={}, metadata={}, wait=True)


def has_base(stage_dir: str | Path) -> bool:
    """Whether ``save_base`` has finished in this stage."""
    return is_adapted(stage_dir) and _steps(steps_folder(base_folder(stage_dir))) == [0]


def carry_backbone(source: str | Path, stage_dir: str | Path, added: Mapping[str, int] | None = None) -> Path:
    """Copy config, tokenizer and preprocessor of the folder ``source`` into a stage, once; returns where they are.

    Args:
        added: tokens by name that the tokenizer is to have too.
    """
    folder = backbone_folder(stage_dir)
    if is_remote(stage_dir):
        copy_side_files(source, twin(folder))
        add_to_tokenizer(twin(folder), added or {})
        folder.mkdir(parents=True, exist_ok=True)
        for path in twin(folder).iterdir():
            if not (folder / path.name).exists():  # an object is there whole or not at all, a folder is not
                (folder / path.name).write_bytes(path.read_bytes())
    elif not folder.exists():
        partial = folder.with_name(".backbone.partial")
        shutil.rmtree(partial, ignore_errors=True)
        copy_side_files(source, partial)
        add_to_tokenizer(partial, added or {})
        partial.replace(folder)
    return folder


# ------------------------------------------------------------------------------------------------ directories


@dataclasses.dataclass(frozen=True)
class _NewestUndamaged:
    """Which checkpoints outlive the next save: the newest ``count`` that are not known to be damaged."""

    count: int
    damaged: set[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        good = sorted(info.step for info in checkpoints if info.step not in self.damaged)[-self.count :]
        return [info.step in good for info in checkpoints]


def steps_folder(stage_dir: str | Path) -> epath.Path:
    path = epath.Path(stage_dir)
    # Orbax wants absolute paths; resolving would break those of object stores.
    return (path if "://" in str(path) else path.resolve()) / "checkpoints"


def _steps(directory: epath.Path) -> list[int]:
    found: Iterable[Any] = ocp.path.step.standard_name_format().find_all(directory)
    return sorted(info.step for info in found)


def newest_first(directory: epath.Path, missing_ok: bool = False) -> Iterator[int]:
    steps = _steps(directory)
    if not steps and not missing_ok:
        raise MissingCheckpointError(f"{directory} holds no checkpoint: give the folder of a stage that was trained")
    return reversed(steps)


def newest_good(directory: epath.Path, read: Callable[[epath.Path], Result], remedy: str | None = None) -> Result:
    """What ``read`` makes of the newest step that is not damaged; a damaged one is logged.

    Raises:
        CheckpointError: no checkpoint, all are damaged, or what ``read`` raises beside damage.
    """
    damage: list[DamagedCheckpointError] = []
    for step in newest_first(directory):
        try:
            return read(directory / str(step))
        except DamagedCheckpointError as error:
            damage.append(error)
            _log.warning("%s; trying the one before", error)
    raise DamagedCheckpointError(
        f"all checkpoints in {directory} are damaged ({_steps(directory)}, the newest: {damage[0]}): "
        f"{remedy or _remedy(directory.parent)}"
    ) from damage[0]


def _remedy(stage_dir: epath.Path) -> str:
    if stage_dir.name == _BASE and is_folder(backbone_folder(stage_dir.parent)):
        return f"remove {stage_dir}, the command that trains makes it again from the checkpoint that it began with"
    return "train this stage again"


def _require_json(name: str, record: Any) -> None:
    try:
        json.dumps(record)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be saved as JSON ({error}): keep arrays in the trees") from None
