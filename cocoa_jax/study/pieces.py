"""Pieces on disk: one small file each, written whole or not at all, with the hits of every query."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

PIECES, LOCKS = "pieces", "locks"


@dataclasses.dataclass(frozen=True)
class TaskHits:
    """What a task came to: which queries found a right candidate first, and how often guessing would."""

    meta_task: str
    split: str
    candidates: int
    chance: float
    hits: Bool[np.ndarray, " Q"]

    def to_json(self) -> dict[str, Any]:
        """Eight queries a byte."""
        packed = base64.b64encode(np.packbits(self.hits).tobytes()).decode()
        values = {**dataclasses.asdict(self), "queries": len(self.hits), "p_at_1": float(self.hits.mean())}
        return {**values, "hits": packed}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskHits:
        """What ``to_json`` wrote."""
        packed = np.frombuffer(base64.b64decode(values["hits"]), np.uint8)
        hits = np.unpackbits(packed, count=values["queries"]).astype(bool)
        return cls(values["meta_task"], values["split"], values["candidates"], values["chance"], hits)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a piece came to.

    Args:
        arm, recipe, seed, rate: of the piece; the rate is that of its last stage.
        search: whether it is a try of a rate.
        stages: name, steps, FLOPs and seconds of each.
        seconds: of scoring.
        made_of: identity of the last stage's settings; code: version of the program.
        tasks: by name.
    """

    arm: str
    recipe: str
    seed: int
    rate: float
    search: bool
    stages: tuple[dict[str, Any], ...]
    seconds: float
    made_of: str
    code: str
    tasks: dict[str, TaskHits]

    @property
    def flops(self) -> float:
        """Spent by all stages."""
        return float(sum(stage["flops"] for stage in self.stages))

    def mean(self, split: str | None = None, meta_task: str | None = None) -> float:
        """The unweighted mean of p@1 over the tasks of a split or a meta-task; NaN where there is none."""
        return mean_of({name: float(task.hits.mean()) for name, task in self.tasks.items()}, self, split, meta_task)


def mean_of(values: Mapping[str, float], result: Result, split: str | None, meta_task: str | None) -> float:
    """The mean over the tasks of a split and a meta-task, None for any; NaN where there is none."""
    chosen = [
        values[name]
        for name, task in result.tasks.items()
        if split in (None, task.split) and meta_task in (None, task.meta_task)
    ]
    return float(np.mean(chosen)) if chosen else float("nan")


def write_result(folder: Path, name: str, result: Result) -> Path:
    """Put the file of a piece in place, whole."""
    path = folder / PIECES / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return path


def write_json(path: Path, result: Result) -> None:
    """A piece as one file of JSON."""
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    values["tasks"] = {task: hits.to_json() for task, hits in result.tasks.items()}
    aside = path.with_suffix(f".{os.getpid()}.partial")
    aside.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(aside, path)


def read_result(path: Path) -> Result:
    """The file of a piece.

    Raises:
        ValueError: it is none; the message names it.
    """
    try:
        values = json.loads(path.read_text())
        tasks = {name: TaskHits.from_json(task) for name, task in values["tasks"].items()}
        return Result(**{**values, "tasks": tasks, "stages": tuple(values["stages"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no piece of a study ({error!r}): remove it, the study makes it again") from error


def read_results(folder: Path) -> dict[str, Result]:
    """Every piece in a study's folder, or in a folder of nothing but pieces, by name."""
    inside = folder / PIECES
    return {path.stem: read_result(path) for path in sorted((inside if inside.is_dir() else folder).glob("*.json"))}


@contextmanager
def claimed(folder: Path, names: Iterable[str], wait: bool = False) -> Iterator[bool]:
    """Whether these names are this process's alone until the block ends; a process that dies lets go of them.

    Args:
        wait: until others let go of them.
    """
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    files, free = [], True
    try:
        for name in sorted(names):
            file = (folder / LOCKS / name).open("w")
            files.append(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
                break
        yield free
    finally:
        for file in files:
            file.close()
