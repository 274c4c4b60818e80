"""Weights between a Hugging Face folder and the parameter tree, both ways.

Tensors pass one at a time, so that reading costs one copy of the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from cocoa_jax.checkpoints.added_tokens import copy_tokenizer
from cocoa_jax.checkpoints.aside import require_free, written_aside
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.hub_layout import (
    IGNORED,
    TIED_HEAD,
    TIED_TO,
    Leaf,
    Shape,
    Slot,
    Tree,
    hub_key,
    plan,
    raise_problems,
)
from cocoa_jax.checkpoints.safetensors_file import DTYPE_NAMES, DTYPES, Done, Tensor, write_tensors
from cocoa_jax.models.config import read_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = 5_000_000_000
_ROWS = 4096  # rows of two tables that are compared at once
_LARGEST_HALF = float(np.finfo(np.float16).max)

# Whatever a backbone's folder holds beside its weights: config, tokenizer, preprocessor, chat template, licence.
_SIDE_FILES = ("*.json", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")


def patch_of(folder: Path) -> Shape:
    """(channels, time, height, width) of the patches that a folder's config.json describes."""
    vision = read_config(folder).vision
    return (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)


# ---------------------------------------------------------------------------------------------------- reading


def read_folder(folder: str | Path, abstract: Tree) -> dict[str, Any]:
    """Read a backbone's weights: numpy arrays nested as ``abstract``, in its shapes and dtypes.

    Args:
        folder: config.json, and model.safetensors or shards with their index, in the key layout of the hub or of
            transformers 5.
        abstract: the wanted shapes and dtypes, for example ``jax.ShapeDtypeStruct``, nested by name.

    Raises:
        CheckpointError: files that are missing or damaged, and tensors that are missing, unexpected, given twice, of
            another shape or of a dtype that is no float: all of them, in one error, before any weight is read.
    """
    return unflatten_dict(dict(read_leaves(folder, abstract)), sep=".")


def read_leaves(folder: str | Path, abstract: Tree, *, keep_dtype: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """``read_folder`` one leaf at a time, as (dotted path, array), for whoever cannot hold them all.

    Args:
        keep_dtype: give every leaf in the dtype of the file, whatever ``abstract`` says.

    Raises:
        CheckpointError: see ``read_folder``; also a leaf whose layers differ in dtype, where it is to be kept.
    """
    with open_leaves(folder, abstract, keep_dtype=keep_dtype) as leaves:
        for path, leaf in leaves.items():
            yield path, np.asarray(leaf)


@dataclasses.dataclass(frozen=True)
class HubLeaf:
    """An array of a folder whose files are open, read when numpy asks for it.

    ``tensors`` are those that make it up: file, name in it and place.
    """

    shape: Shape
    dtype: np.dtype
    tensors: tuple[tuple[Any, str, Slot], ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        leaf = np.empty(self.shape, self.dtype)
        for file, name, slot in self.tensors:
            slot.put(file.get_tensor(name), leaf)
        return leaf


@contextmanager
def open_leaves(folder: str | Path, abstract: Tree, *, keep_dtype: bool = False) -> Iterator[dict[str, HubLeaf]]:
    """The leaves of ``read_leaves`` by their dotted paths, not read yet; the files are open as long as the context."""
    folder = Path(folder)
    slots = plan(abstract, patch_of(folder))
    leaves = flatten_dict(abstract, sep=".")
    with ExitStack() as stack:
        tensors = open_tensors(folder, slots, stack)
        dtypes = _dtypes(folder, slots, tensors) if keep_dtype else {path: leaf.dtype for path, leaf in leaves.items()}
        made = {}
        for path, group in itertools.groupby(slots.items(), key=lambda item: item[1].path):
            parts = tuple((*tensors[key], slot) for key, slot in group)
            made[path] = HubLeaf(tuple(leaves[path].shape), np.dtype(dtypes[path]), parts)
        yield made


def open_tensors(folder: Path, slots: Mapping[str, Slot], stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Open every shard and find the file and the name of each wanted tensor, or raise all that is wrong."""
    problems: list[str] = []
    found: dict[str, tuple[Any, str]] = {}
    heads: list[tuple[Any, str]] = []
    readable = True
    for shard, listed in _shards(folder, problems).items():
        try:
            file = stack.enter_context(safe_open(folder / shard, framework="np"))
        except (SafetensorError, OSError) as error:
            problems.append(f"{shard}: cannot be read ({error}): copy the file again")
            readable = False
            continue
        names = set(file.keys())
        if listed is not None:
            problems += [f"{name}: the index places it in {shard}, which lacks it" for name in sorted(listed - names)]
            problems += [f"{name}: in {shard}, but not in the index" for name in sorted(names - listed)]
        for name in sorted(names):
            key = hub_key(name)
            if key in found:
                problems.append(f"{name}: {found[key][1]} is the same tensor")
            elif key in slots:
                found[key] = (file, name)
                problems += _misfit(name, file.get_slice(name), slots[key])
            elif key == TIED_HEAD:
                heads.append((file, name))
            elif not IGNORED.fullmatch(key):
                problems.append(f"{name}: unexpected, the config has no place for it")
    if readable:  # else nobody knows what the damaged file held, and the list would bury its name
        problems += [f"{key}: missing, wanted {list(slot.shape)}" for key, slot in slots.items() if key not in found]
    problems += [problem for head in heads if TIED_TO in found for problem in _untied(head, found[TIED_TO])]
    raise_problems(f"{folder} does not hold the weights that its config.json describes", problems)
    return found


def _untied(head: tuple[Any, str], table: tuple[Any, str]) -> list[str]:
    """What makes a saved head other than the embedding that config.json ties it to; a part is held at a time."""
    (file, name), (table_file, table_name) = head, table
    left, right = file.get_slice(name), table_file.get_slice(table_name)
    rows = list(left.get_shape())[:1]
    same = (
        (left.get_shape(), left.get_dtype()) == (right.get_shape(), right.get_dtype())
        and rows
        and all(
            left[start:end].tobytes() == right[start:end].tobytes()
            for start, end in itertools.pairwise([*range(0, rows[0], _ROWS), rows[0]])
        )
    )
    return [] if same else [f"{name}: differs from {table_name}, to which config.json ties it: untie it there"]


def _dtypes(folder: Path, slots: Mapping[str, Slot], tensors: Mapping[str, tuple[Any, str]]) -> dict[str, np.dtype]:
    """The dtype of every leaf in the files."""
    held: dict[str, dict[str, int]] = {}
    for key, slot in slots.items():
        file, name = tensors[key]
        counts = held.setdefault(slot.path, {})
        dtype = file.get_slice(name).get_dtype()
        counts[dtype] = counts.get(dtype, 0) + 1
    mixed = [f"{path}: its layers are {counts}, expected one dtype" for path, counts in held.items() if len(counts) > 1]
    raise_problems(f"{folder} cannot be kept byte for byte", mixed)
    return {path: DTYPES[next(iter(counts))] for path, counts in held.items()}


def _misfit(name: str, header: Any, slot: Slot) -> list[str]:
    """What keeps a tensor from its place, read off the file's header."""
    shape, dtype = tuple(header.get_shape()), header.get_dtype()
    problems = [f"{name}: shape {list(shape)}, wanted {list(slot.shape)}"] if shape != slot.shape else []
    return problems + ([f"{name}: dtype {dtype}, expected one of {sorted(DTYPES)}"] if dtype not in DTYPES else [])


def _shards(folder: Path, problems: list[str]) -> Mapping[str, set[str] | None]:
    """Weight files of a folder, each with the tensors that the index says it has (None without an index)."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():
        if index.exists():
            problems.append(f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}: remove the one that is out of date")
        return {SINGLE_FILE: None}
    if not index.exists():
        problems.append(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors are read")
        return {}
    shards: dict[str, set[str]] = {}
    try:
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            if Path(shard).name != shard:
                raise ValueError(f"shard {shard!r} is no plain file name")
            shards.setdefault(shard, set()).add(name)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        problems.append(f"{INDEX_FILE}: cannot be read ({error!r}): copy the file again")
        return {}
    return shards


# ---------------------------------------------------------------------------------------------------- writing


def write_folder(
    folder: str | Path,
    params: Tree,
    config_source_folder: str | Path,
    dtype: Any = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    done: Done = lambda count: None,
    tokenizer_source_folder: str | Path | None = None,
) -> None:
    """Write a backbone as a Hugging Face folder in the hub's key layout; it appears whole or not at all.

    Args:
        folder: must not exist, or be empty.
        params: the parameter tree; leaves are turned into numpy arrays one at a time.
        config_source_folder: its config, tokenizer and preprocessor files are carried along.
        dtype: float32, bfloat16 or float16; None keeps the dtype of each leaf.
        max_shard_size: bytes; a larger model is cut into shards with an index.
        done: hears of the bytes of every tensor that is written.
        tokenizer_source_folder: whose tokenizer files are carried along in place of those, None for the same.

    Raises:
        CheckpointError: the destination is taken, the disk is too small, the parameters do not fit the config, or a
            number does not fit the dtype.
    """
    folder, source = Path(folder), Path(config_source_folder)
    require_free(folder)
    leaves = flatten_dict(params, sep=".")
    slots = plan(params, patch_of(source))
    entries = _entries(slots, leaves, None if dtype is None else np.dtype(dtype))
    with written_aside(folder, sum(entry.size for entry in entries)) as partial:
        copy_side_files(source, partial)
        if tokenizer_source_folder is not None:
            copy_tokenizer(tokenizer_source_folder, partial)
        _state_dtype(partial / "config.json", {entry.dtype for entry in entries})
        _write_shards(partial, entries, leaves, max_shard_size, done)


def copy_side_files(source: str | Path, destination: str | Path) -> None:
    """Copy what a backbone's folder holds beside its weights: config, tokenizer, preprocessor, licence.

    Raises:
        CheckpointError: ``source`` holds no config.json.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} holds no config.json: give the folder of a Hugging Face backbone")
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted({path for pattern in _SIDE_FILES for path in source.glob(pattern)}):
        if path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, destination / path.name)


@dataclasses.dataclass(frozen=True)
class _Entry:
    key: str
    slot: Slot
    dtype: np.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.slot.shape)) * self.dtype.itemsize

    def tensor(self, load: _LastLeaf) -> Tensor:
        return Tensor(self.key, self.slot.shape, self.dtype, lambda: self._data(load(self.slot.path)))

    def _data(self, leaf: np.ndarray) -> np.ndarray:
        if self.dtype == np.float16 and leaf.dtype != np.float16:
            value = leaf if self.slot.layer is None else leaf[self.slot.layer]
            largest = max(float(value.max()), -float(value.min()))
            if largest > _LARGEST_HALF:
                raise CheckpointError(
                    f"{self.key}: {largest:g} does not fit float16, which ends at {_LARGEST_HALF:g}: write bfloat16"
                )
        return self.slot.take(leaf, self.dtype)


def _entries(slots: Mapping[str, Slot], leaves: Mapping[str, Leaf], dtype: np.dtype | None) -> list[_Entry]:
    """Tensors in the order of the file: leaf by leaf, wider dtypes first so that all of them are aligned."""
    entries = [_Entry(key, slot, dtype or np.dtype(leaves[slot.path].dtype)) for key, slot in slots.items()]
    wrong = sorted({f"{entry.slot.path}: dtype {entry.dtype}" for entry in entries if entry.dtype not in DTYPE_NAMES})
    raise_problems(f"only {', '.join(map(str, DTYPE_NAMES))} are written", wrong)
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def _state_dtype(config: Path, dtypes: set[np.dtype]) -> None:
    """Make config.json name the dtype of the weights, which transformers would otherwise cast them from."""
    values = json.loads(config.read_text())
    stated = [key for key in ("dtype", "torch_dtype") if isinstance(values.get(key), str)]
    name = str(next(iter(dtypes))) if len(dtypes) == 1 else None
    if name is not None and any(values[key] != name for key in stated):
        config.write_text(json.dumps({**values, **dict.fromkeys(stated, name)}, indent=2) + "\n")


def _write_shards(folder: Path, entries: list[_Entry], leaves: Mapping[str, Leaf], limit: int, done: Done) -> None:
    shards: list[list[_Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    load = _LastLeaf(leaves)
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, [entry.tensor(load) for entry in shard], done)
    if count > 1:
        places = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class _LastLeaf:
    """Leaves as numpy arrays, of which only the last one asked for is held."""

    def __init__(self, leaves: Mapping[str, Leaf]):
        self._leaves, self._path, self._value = leaves, "", np.empty(0)

    def __call__(self, path: str) -> np.ndarray:
        if path != self._path:
            self._value = np.empty(0)  # the old one is gone before the new one comes
            self._path, self._value = path, np.asarray(self._leaves[path])
        return self._value
