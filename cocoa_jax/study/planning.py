"""What each piece of a study has to run: its stages, their folders and FLOPs, and the rate that its recipe is given."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import TrainConfig, to_dict
from cocoa_jax.data.processor import Processor
from cocoa_jax.recipe import Recipe, is_done, make_picture_backbone
from cocoa_jax.study.design import (
    Arm,
    Piece,
    Study,
    arm_of,
    best_rate,
    chain,
    equal_steps,
    identity,
    recipe_of,
    with_steps,
)
from cocoa_jax.study.flops import step_flops
from cocoa_jax.study.pieces import PIECES, Result, claimed, read_result

COSTS, LEFT_OUT = "costs.json", "left_out"


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece in full.

    Args:
        rate: of the search; the arm's own factor is in the settings.
        flops: of each stage.
    """

    piece: Piece
    arm: Arm
    rate: float
    recipe: Recipe
    backbone: Path
    stages: tuple[TrainConfig, ...]
    flops: tuple[float, ...]

    @property
    def folders(self) -> tuple[str, ...]:
        """Names of the folders of its stages, by which pieces share them."""
        return tuple(Path(stage.output).name for stage in self.stages)


@dataclasses.dataclass(frozen=True)
class Planner:
    """Turns pieces into work, in the folder of one study."""

    study: Study
    folder: Path
    # To read and check the settings of a piece takes a fifth of a second.
    known: dict[tuple[Piece, float], Work] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def is_done(self, piece: Piece) -> bool:
        """Whether the piece's file is there."""
        return (self.folder / PIECES / f"{piece.name}.json").is_file()

    def is_out(self, piece: Piece) -> bool:
        """Whether the piece came to numbers that are not finite, or every try of its recipe did."""
        if (self.folder / LEFT_OUT / piece.name).is_file():
            return True
        recipe = arm_of(self.study, piece).recipe
        tries = [Piece(recipe, 0, rate) for rate in self.study.rates]
        searched = piece.rate is None and len(tries) > 1
        return searched and all((self.folder / LEFT_OUT / one.name).is_file() for one in tries)

    def leave_out(self, piece: Piece, why: str) -> None:
        """Remember that a piece cannot be made; whoever removes the file has it tried again."""
        (self.folder / LEFT_OUT).mkdir(exist_ok=True)
        (self.folder / LEFT_OUT / piece.name).write_text(f"{why}\n")

    def rate(self, recipe: str) -> float | None:
        """The rate of the search with the best mean on validation tasks; None while a try is missing."""
        if len(self.study.rates) == 1:
            return self.study.rates[0]
        tries = [Piece(recipe, 0, rate) for rate in self.study.rates]
        if not all(self.is_done(one) or self.is_out(one) for one in tries):
            return None
        done = zip(self.study.rates, tries, strict=True)
        return best_rate(self.study.rates, {rate: self._result(one).mean() for rate, one in done if self.is_done(one)})

    def work(self, piece: Piece) -> Work | None:
        """All that a piece takes; None while the rate of its recipe is not found."""
        rate = piece.rate if piece.rate is not None else self.rate(arm_of(self.study, piece).recipe)
        return None if rate is None else self._work(piece, rate)

    def possible(self, piece: Piece) -> list[Work]:
        """What a piece may take, by the rates that may be found for it."""
        known = self.work(piece)
        return [known] if known else [self._work(piece, rate) for rate in self.study.rates]

    def needed(self, pieces: Iterable[Piece]) -> set[str]:
        """Folders of stages that these pieces may still need."""
        return {name for piece in pieces for work in self.possible(piece) for name in work.folders}

    def seconds_left(self, pieces: Sequence[Piece], done: Sequence[Piece]) -> float | None:
        """For one process, by what was done so far; None before anything is."""
        results = [self._result(piece) for piece in done]
        stages = {stage["folder"]: stage for result in results for stage in result.stages}.values()
        flops = sum(stage["flops"] for stage in stages)
        if not flops:
            return None
        pace = sum(stage["seconds"] for stage in stages) / flops
        scoring = sum(result.seconds for result in results) / len(results)
        left = {
            config.output: flops
            for work in (self.possible(piece)[0] for piece in pieces)
            for config, flops in zip(work.stages, work.flops, strict=True)
            if not is_done(config)
        }
        return pace * sum(left.values()) + scoring * len(pieces)

    def _result(self, piece: Piece) -> Result:
        return read_result(self.folder / PIECES / f"{piece.name}.json")

    def _work(self, piece: Piece, rate: float) -> Work:
        if (piece, rate) not in self.known:
            self.known[piece, rate] = self._new_work(piece, rate)
        return self.known[piece, rate]

    def _new_work(self, piece: Piece, rate: float) -> Work:
        arm = arm_of(self.study, piece)
        recipe = recipe_of(self.study, arm, piece.seed, rate)
        backbone, stages = chain(recipe, self.folder)
        flops = [self._step_flops(stage, recipe) * stage.loop.steps for stage in stages]
        if arm.compute is not None:
            other = Piece(arm.compute, piece.seed)
            total = sum(self._work(other, rate).flops)
            each = flops[-1] / stages[-1].loop.steps
            steps = equal_steps(total, sum(flops[:-1]), each)
            recipe = with_steps(recipe, steps)
            backbone, stages = chain(recipe, self.folder)
            flops[-1] = each * steps
        return Work(piece, arm, rate, recipe, backbone, tuple(stages), tuple(flops))

    def _step_flops(self, config: TrainConfig, recipe: Recipe) -> float:
        """FLOPs of a step, counted once for all seeds and rates, and remembered."""
        assert recipe.init is not None
        sizes = dataclasses.replace(recipe.init.backbone, seed=0)
        key = identity([to_dict(sizes), config.stage, to_dict(config.data)])
        path = self.folder / COSTS
        known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            first = dataclasses.replace(recipe, init=dataclasses.replace(recipe.init, backbone=sizes))
            folder = chain(first, self.folder)[0]
            make_backbone_once(folder, first, self.folder)
            backbone = open_backbone(folder)
            processor = Processor.load(backbone.side_files, backbone.config, config.data.processor)
            known[key] = step_flops(config, processor)
            aside = path.with_suffix(f".{os.getpid()}.partial")
            aside.write_text(json.dumps(known, indent=1))
            os.replace(aside, path)
        return known[key]


def make_backbone_once(backbone: Path, recipe: Recipe, folder: Path) -> None:
    """Make the backbone of a recipe where it is not there, one process at a time."""
    assert recipe.init is not None
    with claimed(folder, [backbone.name], wait=True):
        if not backbone.is_dir():
            make_picture_backbone(backbone, recipe.init.backbone)
