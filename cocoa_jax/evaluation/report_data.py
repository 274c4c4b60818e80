"""What the report shows, as plain data: no model, no file handles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Hit:
    """One of the nearest candidates of a query."""

    label: str
    picture: bytes | None
    score: float  # cosine
    right: bool


@dataclass(frozen=True)
class GalleryRow:
    """A query and its nearest candidates, nearest first; `note` is a word about the outcome."""

    task: str
    query: str
    picture: bytes | None
    hits: tuple[Hit, ...]
    note: str = ""


@dataclass(frozen=True)
class Reconstruction:
    """What the MAE head made of a picture with hidden units: three arrays uint8 [h, w, 3]."""

    label: str
    original: np.ndarray
    masked: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True)
class MapPoint:
    """A picture at a place of the unit square (see `project_2d`)."""

    x: float
    y: float
    picture: bytes
    label: str


@dataclass(frozen=True)
class Curve:
    """The measurements of one stage: arrays of `values` are as long as `steps`, NaN where nothing was logged."""

    stage: str
    steps: np.ndarray
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class ReportData:
    """The whole content of the page; an empty tuple leaves its section out.

    `results` is the content of results.json: {"tasks": {name: {"meta_task", "split", "queries", "candidates", "p_at_1",
    "hit_at_10", "chance", "untrained_p_at_1"}}, "seconds", "config"}; all scores are fractions from 0 to 1.
    """

    title: str
    summary: tuple[str, str, str]
    results: Mapping[str, Any]
    curves: tuple[Curve, ...] = ()
    gallery: tuple[GalleryRow, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    points: tuple[MapPoint, ...] = ()


def read_curve(metrics_jsonl: Path, stage: str) -> Curve:
    """The numbers of a file of JSON lines, sorted by step; a step that was run again after a restart counts once.

    A line that a killed run left unfinished is passed over. Raises ValueError for a whole line without an integer step.
    """
    records: dict[int, dict[str, float]] = {}
    for number, line in enumerate(metrics_jsonl.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise ValueError(
                f'{metrics_jsonl}:{number}: {line[:60]!r} has no integer "step"; '
                "name a file of metrics, one JSON object a line"
            )
        records[entry["step"]] = {
            name: float(value) for name, value in entry.items() if name != "step" and type(value) in (int, float)
        }
    steps = sorted(records)
    names = dict.fromkeys(name for step in steps for name in records[step])
    values = {name: np.array([records[step].get(name, np.nan) for step in steps]) for name in names}
    return Curve(stage, np.array(steps, dtype=np.int64), values)
