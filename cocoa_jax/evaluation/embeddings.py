"""The embeddings of tasks on disk, so that what was embedded once is not embedded again."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cocoa_jax.evaluation.tasks import Task

Embeddings = tuple[np.ndarray, np.ndarray]  # of a task's queries and candidates, float32 [Q, D] and [C, D]

_STAMP = "made_with"


def save_embeddings(path: Path, embeddings: Mapping[str, Embeddings], made_with: Mapping[str, Any]) -> None:
    """Writes `<task>/queries` and `<task>/candidates` as npz, whole or not at all, and the settings they came from."""
    arrays = {_STAMP: np.array(json.dumps(made_with, sort_keys=True))}
    for name, (queries, candidates) in embeddings.items():
        arrays |= {f"{name}/queries": queries, f"{name}/candidates": candidates}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    with aside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(aside, path)


def load_embeddings(path: Path, tasks: Sequence[Task], made_with: Mapping[str, Any]) -> dict[str, Embeddings] | None:
    """What `save_embeddings` wrote; None if that is not there, is damaged, or belongs to other settings or tasks."""
    try:
        with np.load(path) as file:
            if str(file[_STAMP]) != json.dumps(made_with, sort_keys=True):
                return None
            found = {task.name: (file[f"{task.name}/queries"], file[f"{task.name}/candidates"]) for task in tasks}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    for task in tasks:
        queries, candidates = found[task.name]
        if (len(queries), len(candidates)) != (len(task.queries), len(task.candidates)):
            return None
    return found
