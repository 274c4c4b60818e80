"""The folder of a stage: which run it belongs to, and which checkpoint that began from.

STAGE/config.json    settings of the run
STAGE/mixture.json   what names its data, see ``Mixture.identity``
STAGE/parent.json    the checkpoint that it began from, see ``Backbone.origin``, and the tokens ``added`` to it
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from cocoa_jax.checkpoints.backbone import Backbone, open_backbone
from cocoa_jax.checkpoints.errors import MissingCheckpointError
from cocoa_jax.checkpoints.orbax import backbone_folder, carry_backbone, read_metadata
from cocoa_jax.checkpoints.places import fetch, folder_at, is_remote, twin
from cocoa_jax.config import READING, SettingsError, TrainConfig, differences, evaluate_config_of, to_dict
from cocoa_jax.data.mixture import Mixture
from cocoa_jax.models.config import read_config

_log = logging.getLogger(__name__)
_PARENT = "parent.json"
# What only says where things lie, and how a run is computed, spread and saved. Data and the checkpoint to begin with
# are known by their contents.
HOW = (  # settings that may change between two commands of one run
    "output",
    "checkpoint",
    "mesh",
    "distributed",
    "data.mixture",
    "data.threads",
    "data.workers",
    "compute.remat",
    "compute.chunk_rows",
    "compute.chunk_tokens",
    "compute.chunk_remat",
    "loop.checkpoint_every",
    "loop.keep",
    "loop.profile",
    "loop.compilation_cache",
    "loop.wandb",
)


def open_parent(config: TrainConfig) -> Backbone:
    """The checkpoint to begin with; a run that continues does without its weights where they are gone.

    Raises:
        CheckpointError, ConfigError: there is no such checkpoint and no run that began from it, or it cannot be read.
        SettingsError: a stage that was trained with settings which this one cannot change.
    """
    try:
        backbone = open_backbone(config.checkpoint)
        trained = read_metadata(backbone.path)["config"] if backbone.trained else None
    except MissingCheckpointError:
        if not has_begun(config.output):
            raise
        carried = fetch(backbone_folder(config.output))
        return Backbone(folder_at(config.checkpoint), carried, read_config(carried), trained=False)
    if trained is not None:  # converted, not trained
        check_shared(config, trained, backbone.path)
    return backbone


def has_begun(output: str | Path) -> bool:
    """Whether there is a run in a folder; it has its tokenizer there, with the tokens that were added."""
    return bool((folder_at(output) / _PARENT).exists())


def check_shared(config: TrainConfig, trained: Mapping[str, Any], where: object) -> None:
    """Refuse what means something else to this stage than to the one before, which learned it.

    Args:
        trained: settings of that stage, see ``to_dict``; ``where`` it lies.

    Raises:
        SettingsError: naming both sides.
    """
    stages = {trained["stage"], config.stage}
    names = ["positions"]
    names += ["mask_token"] if "contrastive" not in stages else []  # stage 3 hides nothing
    names += ["bridge_tokens"] if "warmup" not in stages else []  # stage 1 has no bridge
    mine, theirs = to_dict(config)["data"]["processor"], trained["data"]["processor"]
    for name in names:
        if mine[name] != theirs[name]:
            raise SettingsError(
                f"data.processor.{name} is {mine[name]!r}, and {theirs[name]!r} in the stage {trained['stage']!r} at "
                f"{where} that this one begins from: give the same, or another checkpoint"
            )


def prepare(config: TrainConfig, mixture: Mixture, parent: Backbone, added: Mapping[str, int] | None = None) -> None:
    """Make the folder of the stage, or see that it is one of the same run.

    Args:
        added: tokens by name that the tokenizer of ``parent`` lacks; that of the stage has them.

    Raises:
        SettingsError: it is another run's, with both sides of what differs; that of ``parent``; or it holds a backbone
            that no run brought there.
    """
    output = folder_at(config.output)
    if parent.path == output or (not is_remote(output) and parent.path.resolve() == output.resolve()):
        raise SettingsError(f"output and checkpoint are both {config.output}: give another output")
    before, begun = epath.Path(backbone_folder(config.output)), has_begun(output)
    if not begun and before.exists():
        _check_ours(output, before)
    output.mkdir(parents=True, exist_ok=True)
    check_settings(output / "config.json", to_dict(config), HOW)
    check_settings(output / "mixture.json", dict(mixture.identity))
    if begun:
        _check_parent(output, parent)
    else:
        origin = parent.origin()
        if before.exists():
            before.rmtree()  # of an attempt that did not come to the end of this, perhaps with another checkpoint
        carry_backbone(parent.side_files, output, added)
        if added:
            names = ", ".join(f"{name} as {row}" for name, row in added.items())
            _log.warning("the tokenizer of %s gets %s; such a row begins as the mean of the others", parent.path, names)
        reading = evaluate_config_of(to_dict(config))
        (backbone_folder(output) / READING).write_text(json.dumps(to_dict(reading), indent=1))  # in place of a former
        _write_whole(output / _PARENT, {**origin, "added": dict(added or {})})


def origin_of(config: TrainConfig) -> dict[str, Any]:
    """The checkpoint that the run in a folder began from, where it lies now."""
    return {**json.loads((folder_at(config.output) / _PARENT).read_text()), "path": config.checkpoint}


def check_settings(path: Path, settings: dict[str, Any], how: Iterable[str] = ()) -> None:
    """Keep the settings of a folder, or refuse to continue it with others, naming them, but for those in ``how``."""
    if not path.exists():
        return _write_whole(path, settings)
    changed = differences(without(json.loads(path.read_text()), how), without(settings, how))
    if changed:
        raise SettingsError(
            f"{path.parent} was made with other settings ({'; '.join(changed)}): give another output or remove it"
        )


def _check_ours(output: Path, before: epath.Path) -> None:
    """See that a run may take back the folder ``before``: every attempt of ours writes its settings first."""
    if not (output / "config.json").exists() or any(before.glob("*.safetensors")):
        raise SettingsError(f"{before} is not of a run of this folder and would be replaced: give another output")


def _check_parent(output: Path, parent: Backbone) -> None:
    """By fingerprint: a folder may move. Weights in one file after another take their time, so not where it did not."""
    began = json.loads((output / _PARENT).read_text())
    gone, moved = parent.side_files == twin(backbone_folder(output)), str(parent.path) != began["path"]
    if gone or not (moved or parent.trained):
        return
    found = parent.fingerprint()
    if found != began["fingerprint"]:
        raise SettingsError(
            f"{output} was begun from {began['path']} (fingerprint {began['fingerprint']}), {parent.path} has {found}: "
            "give the checkpoint that it began from, or another output"
        )


def without(settings: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Settings but for those of these names, such as ``seed`` or ``loop.keep``."""
    kept = {name: part for name, part in settings.items() if name not in names}
    return {
        name: {key: value for key, value in part.items() if f"{name}.{key}" not in names}
        if isinstance(part, dict)
        else part
        for name, part in kept.items()
    }


def _write_whole(path: Path, values: dict[str, Any]) -> None:
    # An object of a bucket is there whole or not at all, and a renamed one is copied.
    aside = path if is_remote(path) else path.with_suffix(".partial")
    aside.write_text(json.dumps(values, indent=1))
    if aside != path:
        aside.replace(path)
