"""Weights with their adapter merged as a Hugging Face folder, one array at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cocoa_jax.checkpoints.added_tokens import wider_tokenizer
from cocoa_jax.checkpoints.aside import require_free
from cocoa_jax.checkpoints.backbone import Backbone, open_backbone
from cocoa_jax.checkpoints.hub_layout import Leaf, Shape
from cocoa_jax.checkpoints.huggingface import open_leaves, write_folder
from cocoa_jax.checkpoints.orbax import base_folder, is_adapted
from cocoa_jax.checkpoints.peft import load_adapter
from cocoa_jax.checkpoints.stream import with_newest
from cocoa_jax.models.lora import AdapterRecord, adapted_leaves, merge_leaf
from cocoa_jax.models.qwen2_vl import Params, abstract_params


def merge_checkpoint(
    checkpoint: str | Path, folder: str | Path, adapter: str | Path | None = None, dtype: str | None = None
) -> None:
    """Write the weights of a stage (its own adapter merged) or of a Hugging Face folder as a Hugging Face folder.

    Args:
        adapter: a folder of PEFT that is merged into them; its tokenizer comes along where it knows more tokens.
        dtype: of the tensors, float32 by default.

    Raises:
        CheckpointError: an adapter that does not fit, a damaged checkpoint, or a destination that is taken.
    """
    backbone = open_backbone(checkpoint)
    # Before any weight: what is wrong with an adapter is soon told.
    added = None if adapter is None else load_adapter(adapter, backbone.config)
    own = backbone.adapter() if backbone.trained and is_adapted(backbone.path) else None
    words = None if adapter is None else wider_tokenizer(backbone.side_files, adapter)
    require_free(Path(folder))

    def write(params: dict[str, Any]) -> None:
        leaves = flatten_dict(params, sep=".")
        if own is not None:  # merged as it was trained, and only then cast: two roundings are not one
            leaves = _merged(leaves, *own, own[0].config.base_dtype)
        if added is not None:
            leaves = _merged(leaves, *added, "float32")
        whole = unflatten_dict(leaves, sep=".")
        write_folder(folder, whole, backbone.side_files, dtype or "float32", tokenizer_source_folder=words)

    _read(backbone, own is not None, write)


def _read(backbone: Backbone, adapted: bool, write: Any) -> None:
    described = abstract_params(backbone.config)
    if backbone.trained:
        return with_newest(base_folder(backbone.path) if adapted else backbone.path, described, write)
    with open_leaves(backbone.path, described) as leaves:
        write(unflatten_dict(leaves, sep="."))


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """An array of a backbone with its part of an adapter, made when numpy asks for it.

    Args:
        dtype: in which the array is merged.
    """

    leaf: Leaf
    part: Mapping[str, Any]
    record: AdapterRecord
    dtype: np.dtype

    @property
    def shape(self) -> Shape:
        """That of the array."""
        return self.leaf.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = np.asarray(self.leaf).astype(self.dtype, copy=False)
        return np.asarray(merge_leaf(value, self.part, self.record.config, self.record.rows, donate=True))


def _merged(leaves: Mapping[str, Leaf], record: AdapterRecord, adapter: Params, dtype: str) -> dict[str, Leaf]:
    parts, kind = adapted_leaves(adapter), np.dtype(jnp.dtype(dtype))
    return {
        path: MergedLeaf(leaf, parts[path], record, kind) if path in parts else leaf for path, leaf in leaves.items()
    }
