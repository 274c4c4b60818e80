"""Backbones between Hugging Face folders and stages of ours, both ways, byte for byte and one array at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from cocoa_jax.checkpoints.aside import require_free, written_aside
from cocoa_jax.checkpoints.backbone import Backbone, open_backbone
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.huggingface import DEFAULT_SHARD_SIZE, read_leaves, write_folder
from cocoa_jax.checkpoints.orbax import carry_backbone, is_adapted
from cocoa_jax.checkpoints.stream import save_params, with_newest
from cocoa_jax.models.qwen2_vl import abstract_params

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}


def hf_to_orbax(source: str | Path, destination: str | Path, *, progress: bool = False) -> None:
    """Make a folder like a trained stage's out of a Hugging Face folder, every tensor in the dtype of its file.

    Args:
        source: config.json, tokenizer and preprocessor files, and safetensors in the key layout of the hub or of
            transformers 5.
        destination: must not exist, or be empty; it appears whole or not at all.
        progress: whether to show a bar.

    Raises:
        CheckpointError: all that is wrong with the source, a taken destination, or a disk that is too small.
        ConfigError: the source is of another architecture.
    """
    folder, backbone = Path(destination), _open(source, trained=False)
    require_free(folder)
    size = sum(path.stat().st_size for path in backbone.path.glob("*.safetensors"))
    metadata = {"stage": "converted", "config": None, "parent": None, "source": str(source)}
    leaves = read_leaves(backbone.path, abstract_params(backbone.config), keep_dtype=True)
    with _bar("hf-to-orbax", size, progress) as bar, written_aside(folder, size) as partial:
        carry_backbone(backbone.path, partial)
        save_params(partial, leaves, metadata, bar.update)


def orbax_to_hf(
    source: str | Path,
    destination: str | Path,
    dtype: Any = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    *,
    progress: bool = False,
) -> None:
    """Make a Hugging Face folder out of the newest good checkpoint of a stage, trained or converted.

    Args:
        source: a stage's folder.
        destination: must not exist, or be empty; it appears whole or not at all.
        dtype: float32, bfloat16 or float16; None keeps what the checkpoint has.
        max_shard_size: bytes of a file; a larger model is cut into shards with an index.
        progress: whether to show a bar.

    Raises:
        CheckpointError: all that is wrong with the source, a taken destination, or a disk that is too small.
    """
    backbone = _open(source, trained=True)
    if is_adapted(backbone.path):
        raise CheckpointError(f"{source} trained an adapter: cocoa adapter merge writes the folder")
    require_free(Path(destination))

    def write(params: dict[str, Any]) -> None:
        held = [(np.prod(leaf.shape), np.dtype(dtype or leaf.dtype)) for leaf in jax.tree.leaves(params)]
        size = sum(int(count) * dtype.itemsize for count, dtype in held)
        with _bar("orbax-to-hf", size, progress) as bar:
            write_folder(destination, params, backbone.side_files, dtype, max_shard_size, bar.update)

    with_newest(backbone.path, abstract_params(backbone.config), write)


def _bar(name: str, size: int, shown: bool) -> tqdm:
    return tqdm(total=size, desc=name, unit="B", unit_scale=True, disable=not shown, leave=False)


def _open(source: str | Path, *, trained: bool) -> Backbone:
    backbone = open_backbone(source)
    if backbone.trained and not trained:
        raise CheckpointError(f"{source} is a stage already: it needs no conversion, or use orbax-to-hf")
    if trained and not backbone.trained:
        raise CheckpointError(
            f"{source} is a Hugging Face folder already: give a stage, or convert it with hf-to-orbax"
        )
    return backbone


def byte_count(text: str) -> int:
    """A number of bytes such as 5000000, 500MB or 5GiB.

    Raises:
        ValueError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match and (match[2] or "") in _UNITS else 0
    if size < 1:
        raise ValueError(f"{text!r} is no number of bytes: write 500MB or 5GB")
    return size
