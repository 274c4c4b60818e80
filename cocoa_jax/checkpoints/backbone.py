"""A backbone from wherever it lies: a Hugging Face folder, or a stage that was trained here."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import jax

from cocoa_jax.checkpoints.errors import CheckpointError, MissingCheckpointError
from cocoa_jax.checkpoints.huggingface import read_folder
from cocoa_jax.checkpoints.orbax import (
    backbone_folder,
    base_folder,
    fingerprint,
    is_adapted,
    load_params,
    load_trees,
    newest_step,
    read_metadata,
)
from cocoa_jax.checkpoints.places import fetch, folder_at, is_folder, is_remote
from cocoa_jax.checkpoints.sharded import is_placed, read_onto
from cocoa_jax.models.config import Qwen2VLConfig, read_config
from cocoa_jax.models.lora import AdapterRecord, adapted_graph, merge
from cocoa_jax.models.qwen2_vl import Compute, Params, abstract_params

_BLOCK = 2**24  # bytes of a file held at once


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Where a backbone lies and what it is; its weights are read by ``load``.

    Args:
        path: the folder that the user named.
        side_files: the folder of config.json, tokenizer and preprocessor.
        config: sizes of the backbone.
        trained: whether ``path`` is a stage of ours rather than a Hugging Face folder.
    """

    path: Path
    side_files: Path
    config: Qwen2VLConfig
    trained: bool

    def load(self, wanted: Params | None = None) -> Params:
        """The weights, in float32 where ``wanted`` does not say otherwise; an adapter is merged into them.

        Args:
            wanted: shapes, types and shardings, straight onto which the weights are read; a Hugging Face folder is
                read into host memory where they name no shardings.

        Raises:
            CheckpointError: weights that are missing, damaged or of another shape.
        """
        described = abstract_params(self.config) if wanted is None else wanted
        if not self.trained:
            return read_onto(self.path, described) if is_placed(described) else read_folder(self.path, described)
        if not is_adapted(self.path):
            return load_params(self.path, described)
        record, adapter = self.adapter()
        # Merged as it was trained, and only then cast: two roundings are not one.
        stored = jax.tree.map(lambda leaf: leaf.update(dtype=record.config.base_dtype), described)
        params = merge(load_params(base_folder(self.path), stored), adapter, record.config, record.rows, donate=True)
        return jax.tree.map(lambda leaf, want: leaf.astype(want.dtype), params, described)

    def adapter(self) -> tuple[AdapterRecord, Params]:
        """What a stage trained instead of its backbone.

        Raises:
            CheckpointError: the folder is no stage that trained an adapter, or the adapter cannot be read.
        """
        if not (self.trained and is_adapted(self.path)):
            raise CheckpointError(f"{self.path} trained no adapter: give a stage that was trained with --lora")
        record = AdapterRecord.from_json(read_metadata(self.path)["adapter"])
        _, shapes = adapted_graph(self.config, Compute(), record.config, record.rows)
        return record, load_trees(self.path, {"adapter": shapes})["adapter"]

    def fingerprint(self) -> str:
        """Eight hex digits that tell these weights from others, whatever folder they lie in."""
        if self.trained:
            return fingerprint(self.path)
        total = 0
        for path in sorted(self.path.glob("*.safetensors")):
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    total = zlib.crc32(block, total)
        return f"{total:08x}"

    def origin(self) -> dict[str, object]:
        """What the next stage writes down about where it came from."""
        stage = read_metadata(self.path) if self.trained else None
        return {
            "path": str(self.path),
            "stage": stage and stage["stage"],
            "step": newest_step(self.path) if self.trained else None,
            "fingerprint": self.fingerprint(),
            "parent": stage and stage["parent"],
        }


def open_backbone(path: str | Path) -> Backbone:
    """Look at a folder without reading its weights.

    Raises:
        MissingCheckpointError: the folder is missing.
        ConfigError: it holds no config of a Qwen2-VL or Qwen2.5-VL.
    """
    folder = folder_at(path)
    if is_remote(path) and not is_folder(backbone_folder(path)):
        raise MissingCheckpointError(
            f"checkpoint {path} is not a trained stage: copy a Hugging Face folder to this machine"
        )
    if not is_folder(folder):
        raise MissingCheckpointError(
            f"checkpoint {folder} is not a folder: give a Hugging Face folder or a trained stage"
        )
    trained = is_folder(backbone_folder(folder))
    side_files = fetch(backbone_folder(folder)) if trained else folder
    return Backbone(folder, side_files, read_config(side_files), trained)
