"""``cocoa demo``, ``init`` and ``train``."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command, fields
from cocoa_jax.config import InitConfig, TrainConfig
from cocoa_jax.demo import SCALES, make_picture_backbone, run_demo
from cocoa_jax.evaluation.run import read_results, summary
from cocoa_jax.training.loop import train


def _demo_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/demo", help="folder of everything that the run makes")
    parser.add_argument("--scale", choices=tuple(SCALES), default="standard", help="number of steps of a stage")
    parser.add_argument("--seed", type=int, default=0, help="added to the seeds of the backbone and the stages")


def _demo(given: Namespace) -> None:
    report = run_demo(given.output, given.scale, given.seed)
    sys.stdout.write(f"{summary(read_results(given.output))}\n\nreport: {report}\n")


def _init_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_class_arguments(InitConfig)


DEMO = Command(
    about="Make a small Qwen2-VL and run all three stages on the embedded pictures, with a report.",
    example="cocoa demo --output runs/demo --scale standard",
    options=_demo_options,
    run=_demo,
)
INIT = Command(
    about="Make a small backbone in Hugging Face form from scratch.",
    example="cocoa init --config configs/demo/backbone.yaml --output runs/backbone",
    options=_init_options,
    run=lambda given: make_picture_backbone(given.output, given.backbone),
    config=True,
)
TRAIN = Command(
    about="Train one stage, or continue it where it was.",
    example="cocoa train --config configs/demo/1-warmup.yaml --checkpoint=runs/backbone --loop.steps=200",
    options=lambda parser: parser.add_class_arguments(TrainConfig),
    run=lambda given: train(TrainConfig(**fields(given))),
    config=True,
)
