"""Metrics on Weights & Biases, beside the files of a run; an extra."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa_jax.checkpoints.places import folder_at, twin
from cocoa_jax.config import SettingsError, TrainConfig, to_dict

_NAME = "wandb-id.txt"


def check_installed(project: str | None) -> None:
    """Nothing where no project is asked for, or the client is there.

    Raises:
        SettingsError: it is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise SettingsError(
            f"loop.wandb is {project!r} and wandb is not installed: pip install '.[wandb]' in the clone of "
            "cocoa_jax, or leave it null"
        )


class WandbRun:
    """One run of a project; a stage that continues goes on in the same, by the id in its folder.

    Args:
        project: its name; the client asks for the account, see its documentation (``WANDB_MODE=offline`` asks nothing).
        config: what runs.
    """

    def __init__(self, project: str, config: TrainConfig):
        import wandb  # an extra

        self._run = wandb.init(
            project=project,
            name=Path(config.output).name,
            id=_id_of(config.output),
            resume="allow",
            config=to_dict(config),
            dir=str(twin(config.output)),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The values of a step; those of a step that is there already, before a kill, are dropped by the client."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _id_of(output: str) -> str:
    """The id in the folder of a stage, made where there is none."""
    path = folder_at(output) / _NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return str(path.read_text())
