"""A Hugging Face folder straight onto a mesh: every host reads the part of each tensor that its devices hold."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cocoa_jax.checkpoints.hub_layout import Index, Slot, Tree, plan
from cocoa_jax.checkpoints.huggingface import open_tensors, patch_of

Sources = Mapping[int | None, tuple[Any, str, Slot]]  # by layer (None: not stacked): file, name in it, place


def read_onto(folder: str | Path, wanted: Tree) -> dict[str, Any]:
    """Read a backbone's weights onto the shardings of ``wanted``, one leaf at a time.

    Args:
        folder: a Hugging Face folder, see ``huggingface.read_folder``.
        wanted: ``jax.ShapeDtypeStruct`` with shapes, dtypes and shardings, nested by name.

    Raises:
        CheckpointError: see ``huggingface.read_folder``; before any weight is read.
    """
    folder = Path(folder)
    leaves = flatten_dict(wanted, sep=".")
    slots = plan(wanted, patch_of(folder))
    placed: dict[str, jax.Array] = {}
    with ExitStack() as stack:
        tensors = open_tensors(folder, slots, stack)
        for path, group in itertools.groupby(slots.items(), key=lambda item: item[1].path):
            sources = {slot.layer: (*tensors[key], slot) for key, slot in group}
            placed[path] = _place(sources, leaves[path])
    return unflatten_dict(placed, sep=".")


def _place(sources: Sources, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        index = index or ()
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, leaf.shape, strict=True))
        if bounds not in read:  # devices that hold the same part share one reading
            read[bounds] = read_part(sources, tuple(itertools.starmap(slice, bounds)), leaf.dtype)
        return read[bounds]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def read_part(sources: Sources, index: Index, dtype: Any) -> np.ndarray:
    """The values of one leaf at an index of plain bounds, from the files of the layers that it names."""
    out = np.empty([one.stop - one.start for one in index], dtype)
    if None in sources:
        out[...] = _slice(*sources[None], index)
        return out
    for place, layer in enumerate(range(index[0].start, index[0].stop)):
        out[place] = _slice(*sources[layer], index[1:])
    return out


def _slice(file: Any, name: str, slot: Slot, index: Index) -> np.ndarray:
    """What lies at ``index`` of the place of a tensor; of the file, nothing else is read."""
    inside, rest = slot.transform.part(index)
    return slot.transform.read(file.get_slice(name)[inside])[rest]


def is_placed(wanted: Tree) -> bool:
    """Whether every leaf of a description says where it lies."""
    return all(leaf.sharding is not None for leaf in jax.tree.leaves(wanted))
