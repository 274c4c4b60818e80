"""From the folder of a finished run to its report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.orbax import read_metadata
from cocoa_jax.data.sources import SPLITS, Content, Picture, load_pictures
from cocoa_jax.evaluation.drawings import draw_hidden
from cocoa_jax.evaluation.projection import project_2d
from cocoa_jax.evaluation.report import write_report
from cocoa_jax.evaluation.report_data import Curve, GalleryRow, Hit, MapPoint, Reconstruction, ReportData, read_curve
from cocoa_jax.evaluation.run import Evaluation, evaluate
from cocoa_jax.evaluation.scorer import nearest
from cocoa_jax.evaluation.tasks import Task
from cocoa_jax.models.qwen2_vl import abstract_params

REPORT = "report.html"
_ROWS = 16  # of the gallery
_NEAREST = 5
_DRAWINGS = 9
_POINTS = 300
_SEED = 0  # of what is hidden in the drawings
_GOLDEN = (5**0.5 - 1) / 2
_SPLIT = "test_unseen"  # what is shown first, and drawn
_MAPPED = "caption-to-picture"  # the task whose candidates are the pictures themselves
# Facts about batches and machines, and parts of a norm that is shown.
_NO_CURVE = re.compile(r".*_per_second|mfu|seconds|rows|dropped_masks|masked_tokens|padding_.*|gradient_norm_.*")
_SEEN = {"validation": "Of validation.", "test_seen": "Seen thing, new drawing.", "test_unseen": "Never seen."}
_TITLES = {"warmup": "Warm-up", "bridge": "Bridge", "contrastive": "Contrastive"}
_DEEDS = {
    "warmup": "hidden words and hidden parts of pictures were rebuilt",
    "bridge": "the words of a picture were rebuilt from its <EOS> alone",
    "contrastive": "matching pairs were told from all others of the batch",
}


def build_report(run: Path, stages: Sequence[str]) -> Path:
    """Evaluates the last stage of a run unless that is done, and writes the report; returns where it is.

    Args:
        run: the folder of the run.
        stages: the names of its stages' folders, in order.

    Raises:
        CheckpointError: a stage that was not trained.
    """
    evaluation = evaluate(run / stages[-1], run)
    write_report(run / REPORT, collect_report(run, stages, evaluation))
    return run / REPORT


def collect_report(run: Path, stages: Sequence[str], evaluation: Evaluation) -> ReportData:
    """Everything that the report of a run shows; equal for equal runs."""
    kinds = {stage: str(read_metadata(run / stage)["stage"]) for stage in stages}
    curves = [read_curve(run / stage / "metrics.jsonl", _TITLES[kind]) for stage, kind in kinds.items()]
    seconds = sum(float(curve.values["seconds"].sum()) for curve in curves)
    results = evaluation.results
    return ReportData(
        title="A small Qwen2-VL learns to embed pictures and words",
        summary=_summary(run, stages, evaluation, seconds),
        results={**results, "seconds": {"training": seconds, "evaluation": results["seconds"]}},
        curves=tuple(_shown(curve) for curve in curves),
        gallery=collect_gallery(evaluation),
        reconstructions=tuple(d for stage, kind in kinds.items() if kind == "warmup" for d in _drawings(run / stage)),
        points=collect_points(evaluation),
    )


def collect_gallery(evaluation: Evaluation) -> tuple[GalleryRow, ...]:
    """Queries with their nearest candidates: the tasks take turns, those of things never seen first.

    Nobody chose the queries: the n-th row shows the query at the fraction n times the golden ratio (modulo 1) of its
    task, whatever came of it, so that rows are spread evenly over the queries and show different pictures.
    """
    names = _captions()
    tasks = sorted(evaluation.tasks, key=lambda task: task.split != _SPLIT)
    return tuple(_gallery_row(tasks[n % len(tasks)], evaluation, _spread(n), names) for n in range(_ROWS))


def _spread(n: int) -> float:
    return ((n + 1) * _GOLDEN) % 1


def _gallery_row(task: Task, evaluation: Evaluation, fraction: float, names: Mapping[str, str]) -> GalleryRow:
    queries, candidates = evaluation.embeddings[task.name]
    index = int(fraction * len(task.queries))
    query, right = task.queries[index], task.relevant[index]
    ranked = nearest(queries[index : index + 1], candidates, len(candidates), evaluation.tokens)
    order, cosines = (found[0] for found in ranked)
    place = next(place for place, candidate in enumerate(order, start=1) if candidate in right)
    hits = tuple(
        Hit(_label(task.candidates[i], names), _picture(task.candidates[i]), float(cosine), int(i) in right)
        for i, cosine in zip(order[:_NEAREST], cosines[:_NEAREST], strict=True)
    )
    answer = _label(task.candidates[order[place - 1]], names)
    note = f"{_SEEN[task.split]} Right: {answer}, place {place:,} of {len(candidates):,}."
    return GalleryRow(task.name.partition("/")[0].replace("-", " "), query.text, _picture(query), hits, note)


def collect_points(evaluation: Evaluation) -> tuple[MapPoint, ...]:
    """Test pictures of all splits, taken evenly, at the places that their embeddings give them."""
    names = _captions()
    contents: list[Content] = []
    rows: list[np.ndarray] = []
    for task in evaluation.tasks:
        if task.name.startswith(f"{_MAPPED}/"):
            contents += task.candidates
            rows.append(evaluation.embeddings[task.name][1])
    if not contents:
        return ()
    kept = _evenly(len(contents), _POINTS)
    places = project_2d(np.concatenate(rows)[kept])
    return tuple(
        MapPoint(float(x), float(y), contents[i].images[0].data, _label(contents[i], names))
        for i, (x, y) in zip(kept, places, strict=True)
    )


def _drawings(stage: Path) -> list[Reconstruction]:
    pictures = load_pictures(_SPLIT)
    return draw_hidden(stage, [pictures[i] for i in _evenly(len(pictures), _DRAWINGS)], _SEED)


def _evenly(total: int, wanted: int) -> list[int]:
    """At most `wanted` indices below `total`, the middles of equal parts."""
    count = min(total, wanted)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _shown(curve: Curve) -> Curve:
    """The curve without what says nothing about learning, and without what repeats the loss."""
    loss = curve.values["loss"]
    values = {
        name: series
        for name, series in curve.values.items()
        if name == "loss" or (not _NO_CURVE.fullmatch(name) and not np.array_equal(series, loss, equal_nan=True))
    }
    return Curve(curve.stage, curve.steps, values)


def _captions() -> dict[str, str]:
    """What a picture, or a tile cut from it, is called, by the name of its image."""
    pictures: list[Picture] = [picture for split in SPLITS for picture in load_pictures(split)]
    plain = {picture.image.name: picture.caption for picture in pictures}
    return plain | {f"tile of {picture.id}": picture.caption for picture in pictures}


def _label(content: Content, names: Mapping[str, str]) -> str:
    return names[content.images[0].name] if content.images else content.text


def _picture(content: Content) -> bytes | None:
    return content.images[0].data if content.images else None


def _summary(run: Path, stages: Sequence[str], evaluation: Evaluation, seconds: float) -> tuple[str, str, str]:
    config = open_backbone(run / stages[-1]).config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    noted = [read_metadata(run / stage) for stage in stages]
    trained = len(load_pictures(noted[-1]["config"]["data"]["split"]))
    deeds = "; ".join(
        f"in stage {place} {_DEEDS[stage['stage']]} ({stage['config']['loop']['steps']:,} steps)"
        for place, stage in enumerate(noted, start=1)
    )
    tasks = evaluation.results["tasks"].values()
    p_at_1, untrained, chance = (
        100 * float(np.mean([task[key] for task in tasks])) for key in ("p_at_1", "untrained_p_at_1", "chance")
    )
    held_out = sum(len(load_pictures(split)) for split in evaluation.results["config"]["splits"])
    return (
        f"A Qwen2-VL of {parameters / 1e6:.1f} million parameters was made from scratch and shown {trained:,} pictures "
        "with their words: emoji, clip art, renders and photos.",
        f"{deeds[:1].upper()}{deeds[1:]}; all in {_minutes(seconds)} of training.",
        f"On {len(tasks)} tasks over {held_out:,} held-out pictures its nearest candidate is right for {p_at_1:.1f} % "
        f"of the queries (mean over tasks), the untrained model's for {untrained:.1f} %, a guess for {chance:.1f} %.",
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
