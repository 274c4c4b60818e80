"""``cocoa demo``, ``run``, ``init`` and ``train``."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command, fields
from cocoa_jax.config import InitConfig, SettingsError, TrainConfig
from cocoa_jax.demo import SCALES, run_demo
from cocoa_jax.evaluation.run import read_results, summary
from cocoa_jax.recipe import (
    PICTURES,
    Recipe,
    make_picture_backbone,
    read_recipe,
    run_recipe,
    scored_sets,
    write_stages,
)
from cocoa_jax.training.loop import train


def _demo_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/demo", help="folder of everything that the run makes")
    parser.add_argument("--scale", choices=tuple(SCALES), default="standard", help="number of steps of a stage")
    parser.add_argument("--seed", type=int, default=0, help="added to the seeds of the backbone and the stages")


def _demo(given: Namespace) -> None:
    report = run_demo(given.output, given.scale, given.seed)
    sys.stdout.write(f"{summary(read_results(given.output))}\n\nreport: {report}\n")


def _run_options(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file of a recipe, in this folder or installed")
    parser.add_argument("--output", default=None, help="folder of everything that the run makes")
    parser.add_argument("--checkpoint", default=None, help="Hugging Face folder to begin with")
    parser.add_argument("--data", default=None, help="where the paths of its mixtures begin: a clone of MMEB-train")
    parser.add_argument("--evaluation_data", default=None, help="a clone of MMEB-eval; without it nothing is scored")
    parser.add_argument("--seed", type=int, default=None, help="added to the seeds of the backbone and the stages")
    parser.add_argument("--steps", default=None, help="of each stage, by commas, to try a recipe")
    parser.add_argument(
        "--write", default=None, help="folder for a file of each stage, for train and plan; runs nothing"
    )


def _run(given: Namespace) -> None:
    recipe = read_recipe(given.recipe)
    names = ("output", "checkpoint", "data", "evaluation_data", "seed")
    values = {**vars(recipe), **{name: given[name] for name in names if given[name] is not None}}
    if given.checkpoint is not None:
        values["init"] = None
    steps = None if given.steps is None else _steps(given.steps)
    recipe = Recipe(**values)
    if given.write is not None:
        sys.stdout.write("".join(f"{path}\n" for path in write_stages(recipe, given.write, steps)))
        return
    if recipe.tasks not in (None, PICTURES) and scored_sets(recipe) is None:
        sys.stderr.write(f"cocoa: this run will not be scored: give --evaluation_data, the data of {recipe.tasks}\n")
    report = run_recipe(recipe, steps)
    sys.stdout.write(f"{f'report: {report}' if report else f'done: {recipe.output}'}\n")


def _steps(given: str) -> tuple[int, ...]:
    numbers = given.split(",")
    if not all(number.strip().isdecimal() and int(number) for number in numbers):
        raise SettingsError(f"--steps is {given!r}: give a whole number from 1 for each stage, by commas")
    return tuple(map(int, numbers))


def _init_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_class_arguments(InitConfig)


DEMO = Command(
    about="Make a small Qwen2-VL and run all three stages on the embedded pictures, with a report.",
    example="cocoa demo --output runs/demo --scale standard",
    options=_demo_options,
    run=_demo,
)
RUN = Command(
    about="Run all stages of a recipe in order, with checkpoints between; what is done is not done again.",
    example="cocoa run configs/recipes/pictures/cocoa.yaml --output runs/cocoa",
    options=_run_options,
    run=_run,
    local=("write",),
)
INIT = Command(
    about="Make a small backbone in Hugging Face form from scratch.",
    example="cocoa init --config configs/demo/backbone.yaml --output runs/backbone",
    options=_init_options,
    run=lambda given: make_picture_backbone(given.output, given.backbone),
    config=True,
    local=("output",),
)
TRAIN = Command(
    about="Train one stage, or continue it where it was.",
    example="cocoa train --config configs/demo/1-warmup.yaml --checkpoint=runs/backbone --loop.steps=200",
    options=lambda parser: parser.add_class_arguments(TrainConfig),
    run=lambda given: train(TrainConfig(**fields(given))),
    config=True,
)
