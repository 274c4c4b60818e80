"""Runs a study piece by piece; several processes may work on one folder, and a killed one loses at most its stage."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import jax

from cocoa_jax.config import TrainConfig
from cocoa_jax.embedder import Embedder, default_settings
from cocoa_jax.evaluation.run import embed_tasks
from cocoa_jax.evaluation.scorer import EmbeddingError, rank
from cocoa_jax.evaluation.sets import code_version
from cocoa_jax.evaluation.tasks import Task, picture_tasks
from cocoa_jax.recipe import is_done
from cocoa_jax.study.design import Piece, Study, pieces
from cocoa_jax.study.pieces import PIECES, Result, TaskHits, claimed, read_results, write_result
from cocoa_jax.study.planning import LEFT_OUT, Planner, Work, make_backbone_once
from cocoa_jax.study.staleness import REMEDY, stale
from cocoa_jax.training.divergence import Diverged
from cocoa_jax.training.loop import train

Tell = Callable[[str], object]


class PieceError(RuntimeError):
    """A piece whose training or scoring came to numbers that are not finite."""

    def __init__(self, piece: Piece, error: Exception):
        self.piece = piece
        again = f"remove {LEFT_OUT}/{piece.name} in the study's folder to have it tried again"
        super().__init__(f"{piece.name} left out: {error}; {again}")


_WAIT = 2.0  # seconds between looks at what other processes have finished


def run_study(
    study: Study, folder: str | Path, only: tuple[str, ...], keep: bool, tell: Tell, seeds: int | None = None
) -> None:
    """Makes every piece that is missing.

    Args:
        only, seeds: which pieces; see ``pieces``.
        keep: whether checkpoints stay that no piece of the whole study needs any more.
        tell: gets a line when a piece is done, with the time that is left.

    Raises:
        SettingsError: a question that there is not; whatever training and scoring raise.
    """
    planner = Planner(study, Path(folder))
    planned, whole = pieces(study, only, seeds), pieces(study)
    with _compiled_once(planner.folder):
        while left := [piece for piece in planned if _state(planner, piece) == "left"]:
            try:
                made = _make_one(planner, left)
            except PieceError as error:  # one arm that cannot be trained must not keep the others from it
                planner.leave_out(error.piece, str(error))
                made = str(error)
            if made is None:
                time.sleep(_WAIT)
                continue
            tell(f"{made} ({_progress(planner, planned)})")
            jax.clear_caches()  # a study has hundreds of programs; those on disk are read again
            if not keep:
                _remove_spent(planner, whole)


def listing(study: Study, folder: str | Path, only: tuple[str, ...], seeds: int | None = None) -> str:
    """What is done, stale and left, one line a piece, and the time that is left."""
    planner = Planner(study, Path(folder))
    planned = pieces(study, only, seeds)
    old = set(stale(study, read_results(planner.folder / PIECES))) & {piece.name for piece in planned}
    lines = [f"{'stale' if piece.name in old else _state(planner, piece):5} {piece.name}" for piece in planned]
    if old:
        lines.append(f"{len(old)} stale pieces: {REMEDY}")
    return "\n".join([*lines, _progress(planner, planned)]) + "\n"


def _state(planner: Planner, piece: Piece) -> str:
    return "done" if planner.is_done(piece) else "out" if planner.is_out(piece) else "left"


def _progress(planner: Planner, planned: Sequence[Piece]) -> str:
    """How many pieces are done, and the time that is left."""
    done, left = ([piece for piece in planned if _state(planner, piece) == state] for state in ("done", "left"))
    seconds = planner.seconds_left(left, done)
    time_left = "unknown before a piece is done" if seconds is None else f"{seconds / 60:.0f} minutes of one process"
    return f"{len(done)} of {len(planned)} pieces done; time left: {time_left}"


def _make_one(planner: Planner, left: Sequence[Piece]) -> str | None:
    """Makes the first piece that nobody else is at; None where there is none."""
    for piece in left:
        work = planner.work(piece)
        if work is None:
            continue
        open_stages = [Path(stage.output).name for stage in work.stages if not is_done(stage)]
        with claimed(planner.folder, [piece.name, *open_stages]) as ours:
            if ours and not planner.is_done(piece):
                try:
                    result = _made(planner, work)
                except (Diverged, EmbeddingError) as error:
                    raise PieceError(piece, error) from error
                write_result(planner.folder, piece.name, result)
                return f"{piece.name}: {100 * result.mean():.1f} %"
    return None


def _made(planner: Planner, work: Work) -> Result:
    make_backbone_once(work.backbone, work.recipe, planner.folder)
    for stage in work.stages:
        if not is_done(stage):
            train(stage)
    began = time.perf_counter()
    tasks = score_tasks(work, planner.study.queries)
    piece, last = work.piece, work.stages[-1]
    return Result(
        arm=piece.arm,
        recipe=work.arm.recipe,
        seed=piece.seed,
        rate=last.optimizer.learning_rate,
        search=piece.rate is not None,
        stages=tuple(
            {
                "stage": stage.stage,
                "folder": Path(stage.output).name,
                "steps": stage.loop.steps,
                "flops": flops,
                "seconds": round(_seconds(stage), 1),
            }
            for stage, flops in zip(work.stages, work.flops, strict=True)
        ),
        seconds=round(time.perf_counter() - began, 1),
        made_of=work.folders[-1],
        code=code_version(),
        tasks=tasks,
    )


def score_tasks(work: Work, queries: int | None) -> dict[str, TaskHits]:
    """The hits of every query of the piece's tasks by its last stage.

    Args:
        queries: at most so many a task.
    """
    checkpoint = work.stages[-1].output
    settings = dataclasses.replace(default_settings(checkpoint), width=work.arm.width)
    tasks = [_first(task, queries) for split in work.piece.splits for task in _tasks(split)]
    embeddings = embed_tasks(Embedder(checkpoint, settings), tasks)
    found = {}
    for task in tasks:
        hits = rank(*embeddings[task.name], task.relevant, tokens=settings.compared_apart).level == 0
        right = sum(len(some) for some in task.relevant)
        chance = right / (len(task.candidates) * len(task.queries))
        found[task.name] = TaskHits(task.meta_task, task.split, len(task.candidates), chance, hits)
    return found


@lru_cache(maxsize=3)
def _tasks(split: str) -> tuple[Task, ...]:
    return tuple(picture_tasks(split))


def _first(task: Task, queries: int | None) -> Task:
    """Its first queries and the candidates that are right for them: fewer of both, to be quick."""
    if queries is None or queries >= len(task.queries):
        return task
    kept = sorted({index for right in task.relevant[:queries] for index in right})
    place = {index: number for number, index in enumerate(kept)}
    return dataclasses.replace(
        task,
        queries=task.queries[:queries],
        candidates=tuple(task.candidates[index] for index in kept),
        relevant=tuple(frozenset(place[index] for index in right) for right in task.relevant[:queries]),
    )


def _seconds(stage: TrainConfig) -> float:
    lines = (Path(stage.output) / "metrics.jsonl").read_text().splitlines()
    return float(sum(json.loads(line)["seconds"] for line in lines))


def _remove_spent(planner: Planner, planned: Sequence[Piece]) -> None:
    """Removes stages that no unfinished piece needs; only when all rates are found, which some of them depend on."""
    left = [piece for piece in planned if _state(planner, piece) == "left"]
    if any(piece.rate is not None for piece in left):
        return
    needed = planner.needed(left)
    for folder in (planner.folder / "stages").glob("*"):
        if folder.name not in needed:
            with claimed(planner.folder, [folder.name]) as ours:
                if ours:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _compiled_once(folder: Path) -> Iterator[None]:
    """Programs are kept in the study's folder: seeds share theirs, and processes too."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str((folder / "programs").resolve()))
    jax.config.update(names[1], 0.5)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
