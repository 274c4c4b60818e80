"""Where every tensor of a Hugging Face backbone lives in the parameter tree: one table, used in both directions.

A leaf of the tree holds a tensor of every layer, stacked on a leading axis L; kernels are [in, out] where PyTorch's
linear maps are [out, in].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from flax.traverse_util import flatten_dict

from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.threads import spread

Shape = tuple[int, ...]
Index = tuple[slice, ...]
Tree = Mapping[str, Any]


class Leaf(Protocol):
    """An array, or the description of one."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor differs from its place in a leaf.

    ``tensor_shape`` gives the tensor's shape from that of its place and from the patch (channels, time, height,
    width); ``read`` is a view of the tensor with the shape of its place; ``write`` is the inverse. ``part`` splits an
    index of the place in two: what to take of the tensor, and what to take of that after ``read``.
    """

    tensor_shape: Callable[[Shape, Shape], Shape]
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray, Shape], np.ndarray]
    part: Callable[[Index], tuple[Index, Index]]


KEEP = Transform(
    tensor_shape=lambda place, patch: place,
    read=lambda tensor: tensor,
    write=lambda value, shape: value,
    part=lambda index: (index, ()),
)
TRANSPOSE = Transform(
    tensor_shape=lambda place, patch: place[::-1],
    read=lambda tensor: tensor.T,
    write=lambda value, shape: value.T,
    part=lambda index: (index[::-1], ()),
)
FLATTEN = Transform(
    tensor_shape=lambda place, patch: (place[-1], *patch),
    read=lambda tensor: tensor.reshape(len(tensor), -1).T,
    write=lambda value, shape: value.T.reshape(shape),
    part=lambda index: (index[1:], index[:1]),
)
_BAND = 64  # columns of a matrix that are turned at once: a band of them stays in the cache

# Path of a leaf (regex) -> key on the hub, transform. "{layer}" in a key: the leaf stacks one tensor per layer.
TABLE: tuple[tuple[str, str, Transform], ...] = (
    (r"text\.embed\.table", r"model.embed_tokens.weight", KEEP),
    (r"text\.layers\.input_norm\.scale", r"model.layers.{layer}.input_layernorm.weight", KEEP),
    (r"text\.layers\.post_norm\.scale", r"model.layers.{layer}.post_attention_layernorm.weight", KEEP),
    (r"text\.layers\.attention\.(\w+)\.kernel", r"model.layers.{layer}.self_attn.\1.weight", TRANSPOSE),
    (r"text\.layers\.attention\.(\w+)\.bias", r"model.layers.{layer}.self_attn.\1.bias", KEEP),
    (r"text\.layers\.mlp\.(\w+)\.kernel", r"model.layers.{layer}.mlp.\1.weight", TRANSPOSE),
    (r"text\.norm\.scale", r"model.norm.weight", KEEP),
    (r"text\.head\.kernel", r"lm_head.weight", TRANSPOSE),
    (r"vision\.patch_embed\.kernel", r"visual.patch_embed.proj.weight", FLATTEN),
    (r"vision\.layers\.(norm[12])\.scale", r"visual.blocks.{layer}.\1.weight", KEEP),
    (r"vision\.layers\.(norm[12])\.bias", r"visual.blocks.{layer}.\1.bias", KEEP),
    (r"vision\.layers\.attention\.(\w+)\.kernel", r"visual.blocks.{layer}.attn.\1.weight", TRANSPOSE),
    (r"vision\.layers\.attention\.(\w+)\.bias", r"visual.blocks.{layer}.attn.\1.bias", KEEP),
    (r"vision\.layers\.mlp\.(\w+)\.kernel", r"visual.blocks.{layer}.mlp.\1.weight", TRANSPOSE),
    (r"vision\.layers\.mlp\.(\w+)\.bias", r"visual.blocks.{layer}.mlp.\1.bias", KEEP),
    (r"vision\.merger\.norm\.scale", r"visual.merger.ln_q.weight", KEEP),
    (r"vision\.merger\.norm\.bias", r"visual.merger.ln_q.bias", KEEP),
    (r"vision\.merger\.fc1\.kernel", r"visual.merger.mlp.0.weight", TRANSPOSE),
    (r"vision\.merger\.fc1\.bias", r"visual.merger.mlp.0.bias", KEEP),
    (r"vision\.merger\.fc2\.kernel", r"visual.merger.mlp.2.weight", TRANSPOSE),
    (r"vision\.merger\.fc2\.bias", r"visual.merger.mlp.2.bias", KEEP),
)

# transformers 5 nests both towers under "model" in memory; files of either layout exist.
_NEWER_LAYOUT = ((re.compile(r"^model\.visual\."), "visual."), (re.compile(r"^model\.language_model\."), "model."))

# Tensors that carry nothing of their own: a tied head, which must equal the embedding, and rotary tables that older
# versions saved.
TIED_HEAD, TIED_TO = "lm_head.weight", "model.embed_tokens.weight"
IGNORED = re.compile(r".*\.rotary_(pos_)?emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one tensor: a leaf, and the layer in it when the leaf is stacked."""

    path: str
    layer: int | None
    shape: Shape
    transform: Transform

    def put(self, tensor: np.ndarray, leaf: np.ndarray) -> None:
        """Write the tensor into its place, in the dtype of the leaf."""
        _copy(self.transform.read(tensor), leaf if self.layer is None else leaf[self.layer])

    def take(self, leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The tensor that belongs to this place, contiguous as a file holds it."""
        value = leaf if self.layer is None else leaf[self.layer]
        tensor = self.transform.write(value, self.shape)
        if tensor.flags.c_contiguous:
            return np.ascontiguousarray(tensor, dtype=dtype)
        turned = np.empty(tensor.shape, dtype)
        _copy(tensor, turned)
        return turned


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy between a matrix and a transposed one, several times faster than numpy does by itself."""
    if target.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return

    def turn(begin: int, end: int) -> None:
        for start in range(begin, end, _BAND):
            band = slice(start, min(start + _BAND, end))
            target[:, band] = source[:, band]

    spread(turn, target.shape[1], _BAND)


def plan(tree: Tree, patch: Shape) -> dict[str, Slot]:
    """Every tensor of a backbone by its key on the hub, grouped by leaf: the table, applied to a tree.

    Args:
        tree: arrays or their descriptions, nested by name.
        patch: (channels, temporal_patch_size, patch_size, patch_size).

    Raises:
        CheckpointError: leaves that the table does not know, or a patch embedding of another size.
    """
    slots: dict[str, Slot] = {}
    problems: list[str] = []
    for path, leaf in flatten_dict(tree, sep=".").items():
        matches = [
            (match.expand(key), transform) for rule, key, transform in TABLE if (match := re.fullmatch(rule, path))
        ]
        if len(matches) != 1:
            problems.append(f"{path}: {len(matches)} rules of the table fit this parameter, expected 1")
            continue
        key, transform = matches[0]
        stacked = "{layer}" in key
        place = tuple(leaf.shape[1:] if stacked else leaf.shape)
        if transform is FLATTEN and place[0] != np.prod(patch):
            problems.append(f"{path}: {place[0]} values per patch, but config.json has {patch} = {np.prod(patch)}")
        shape = transform.tensor_shape(place, patch)
        for layer in range(leaf.shape[0]) if stacked else (None,):
            slots[key.format(layer=layer)] = Slot(path, layer, shape, transform)
    raise_problems("the parameters are not those of this backbone", problems)
    return slots


def hub_key(name: str) -> str:
    """The key on the hub of a tensor of either layout."""
    for pattern, replacement in _NEWER_LAYOUT:
        name = pattern.sub(replacement, name)
    return name


def raise_problems(what: str, problems: list[str]) -> None:
    if problems:
        raise CheckpointError("\n  ".join([f"{what} ({len(problems)} problems):", *problems]))
