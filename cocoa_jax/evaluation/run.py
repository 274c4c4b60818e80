"""Embed the tasks, score them, write ``results.json``."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.orbax import read_metadata
from cocoa_jax.checkpoints.places import folder_at
from cocoa_jax.config import EvaluateConfig
from cocoa_jax.data.prompts import instructions_hash
from cocoa_jax.data.sources import Content
from cocoa_jax.embedder import Embedder, default_settings, reading
from cocoa_jax.evaluation.embeddings import Embeddings, load_embeddings, save_embeddings
from cocoa_jax.evaluation.scorer import Score, score
from cocoa_jax.evaluation.tasks import Task, picture_tasks
from cocoa_jax.training.hosts import check_shared, first_alone

RESULTS, EMBEDDINGS = "results.json", "embeddings.npz"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The tasks, what the trained model made of them, and the results as they were written.

    ``tokens`` of an embedding are compared apart, see `scorer.similarities`.
    """

    tasks: tuple[Task, ...]
    embeddings: Mapping[str, Embeddings]
    results: dict[str, Any]
    tokens: int = 1


def evaluate(
    checkpoint: str | Path,
    output: str | Path,
    splits: Sequence[str] = ("test_seen", "test_unseen"),
    untrained: str | Path | None = None,
    settings: EvaluateConfig | None = None,
) -> Evaluation:
    """Score a checkpoint on the picture tasks, beside the chance level and the model that training began with.

    What an earlier call of the same model with the same settings left in ``output`` is taken from there.

    Args:
        checkpoint: a trained stage or a Hugging Face folder.
        output: where ``results.json`` goes, and ``embeddings.npz`` with what the trained model made of the tasks.
        splits: any of validation, test_seen, test_unseen.
        untrained: the model to compare with; by default the folder that the first stage started from. Bridge tokens
            that it lacks are there as training would begin them.
        settings: how to read pixels and text; by default as in training.

    Raises:
        ValueError: naming a split, folder or setting that does not exist, embeddings that are not finite, or an output
            that not all processes see.
    """
    began = time.perf_counter()
    output = Path(output)
    check_shared(output)
    settings = default_settings(checkpoint) if settings is None else settings
    tasks = tuple(task for split in splits for task in picture_tasks(split))
    origin = first_ancestor(checkpoint) if untrained is None else folder_at(untrained)
    config = {
        "checkpoint": str(checkpoint),
        "untrained": str(origin),
        "weights": [open_backbone(folder).fingerprint() for folder in (checkpoint, origin)],
        "reading": [reading(folder, settings) for folder in (checkpoint, origin)],
        "splits": list(splits),
        "instructions": instructions_hash(),
        **settings.identity(),
    }
    trained = load_embeddings(output / EMBEDDINGS, tasks, config)
    if trained is None:
        trained = embed_tasks(Embedder(checkpoint, settings), tasks)
        first_alone("embeddings", partial(save_embeddings, output / EMBEDDINGS, trained, config))
    elif (done := _read(output / RESULTS, config)) is not None:
        return Evaluation(tasks, trained, done, settings.compared_apart)
    first = trained
    if origin != folder_at(checkpoint):
        first = embed_tasks(Embedder(origin, settings, untrained=True), tasks)
    tokens = settings.compared_apart
    scores = {task.name: score(*trained[task.name], task.relevant, tokens) for task in tasks}
    before = {task.name: score(*first[task.name], task.relevant, tokens) for task in tasks}
    results = {
        "tasks": {task.name: _line(task, scores[task.name], before[task.name]) for task in tasks},
        "seconds": round(time.perf_counter() - began, 1),
        "config": config,
    }
    first_alone("results", partial(_write, output / RESULTS, results))
    return Evaluation(tasks, trained, results, tokens)


def embed_tasks(embedder: Embedder, tasks: Iterable[Task]) -> dict[str, Embeddings]:
    """Queries and candidates of every task; contents that several tasks share are embedded once."""
    place: dict[Content, int] = {}
    for task in tasks:
        for content in (*task.queries, *task.candidates):
            place.setdefault(content, len(place))
    rows = embedder.embed_contents(list(place), progress=True)

    def pick(contents: Sequence[Content]) -> np.ndarray:
        return rows[[place[content] for content in contents]]

    return {task.name: (pick(task.queries), pick(task.candidates)) for task in tasks}


def first_ancestor(checkpoint: str | Path) -> Any:
    """The folder that training began with, found by following what each stage noted about its parent."""
    folder = folder_at(checkpoint)
    # A stage without a parent was converted, not trained: training began with it.
    while open_backbone(folder).trained and (parent := read_metadata(folder)["parent"]) is not None:
        folder = folder_at(parent["path"])
    return folder


def read_results(output: str | Path) -> dict[str, Any]:
    """What ``evaluate`` wrote into a folder."""
    results: dict[str, Any] = json.loads((Path(output) / RESULTS).read_text())
    return results


def summary(results: Mapping[str, Any]) -> str:
    """The scores as a table of text, one line a task, and the mean."""
    head = f"{'task':34} {'queries':>7} {'of':>5} {'p@1 %':>6} {'hit@10':>6} {'chance':>6} {'untrained':>9}"
    lines = [head]
    for name, line in results["tasks"].items():
        lines.append(_text(name, line["queries"], line["candidates"], line))
    keys = ("p_at_1", "hit_at_10", "chance", "untrained_p_at_1")
    means = {key: float(np.mean([line[key] for line in results["tasks"].values()])) for key in keys}
    lines.append(_text("mean", "", "", means))
    return "\n".join(lines)


def _text(name: str, queries: object, candidates: object, line: Mapping[str, Any]) -> str:
    return (
        f"{name:34} {queries:>7} {candidates:>5} {100 * line['p_at_1']:6.1f} {100 * line['hit_at_10']:6.1f} "
        f"{100 * line['chance']:6.1f} {100 * line['untrained_p_at_1']:9.1f}"
    )


def _line(task: Task, trained: Score, untrained: Score) -> dict[str, Any]:
    return {
        "meta_task": task.meta_task,
        "split": task.split,
        "queries": trained.queries,
        "candidates": trained.candidates,
        "p_at_1": trained.p_at_1,
        "hit_at_10": trained.hit_at_10,
        "chance": trained.chance,
        "ties": trained.ties,
        "argmax_p_at_1": trained.argmax_p_at_1,
        "untrained_p_at_1": untrained.p_at_1,
    }


def _read(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Results that were written with this very config, None where there are none."""
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        return results if results["config"] == config else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(results, indent=1))
    os.replace(aside, path)
