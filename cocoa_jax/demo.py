"""The main job on the embedded pictures: nothing but the ordinary commands, one after the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cocoa_jax.checkpoints.scratch import ScratchConfig, make_backbone
from cocoa_jax.config import InitConfig, TrainConfig, load_config, named_config
from cocoa_jax.data.prompts import INSTRUCTIONS, plain
from cocoa_jax.data.sources import load_pictures
from cocoa_jax.evaluation.collect import build_report
from cocoa_jax.models.qwen2_vl import abstract_params
from cocoa_jax.training.loop import train

STAGES = ("1-warmup", "2-bridge", "3-contrastive")
# Steps of each stage: fixed numbers, so that a run can be repeated and continued; None takes the config files' own.
SCALES = {"small": (10, 10, 80), "standard": None}


def make_picture_backbone(folder: str | Path, settings: ScratchConfig) -> None:
    """A small Qwen2-VL whose tokenizer has seen the words of the training pictures, and no others.

    Raises:
        CheckpointError: the folder is taken, or sizes that contradict each other.
    """
    words = [
        plain(text)
        for picture in load_pictures("train")
        for text in (picture.caption, *picture.keywords, picture.description, picture.label)
        if text
    ]
    make_backbone(folder, settings, [*words, *INSTRUCTIONS.values()], abstract_params)


def stage_config(stage: str, output: Path, scale: str, seed: int) -> TrainConfig:
    """The config file of a demo stage with its folders under ``output`` and the steps of the scale."""
    config = load_config(TrainConfig, named_config(f"demo/{stage}.yaml"))
    number, scaled = STAGES.index(stage), SCALES[scale]
    before = ("backbone", *STAGES)[number]
    steps = config.loop.steps if scaled is None else scaled[number]
    return dataclasses.replace(
        config,
        checkpoint=str(output / before),
        output=str(output / stage),
        seed=config.seed + 1000 * seed,
        loop=dataclasses.replace(config.loop, steps=steps),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, steps // 2)),
    )


def run_demo(output: str | Path, scale: str, seed: int) -> Path:
    """Backbone, three stages, evaluation and report; a part that is done is not done again. Returns the report."""
    folder = Path(output)
    if not (folder / "backbone").is_dir():
        settings = load_config(InitConfig, named_config("demo/backbone.yaml")).backbone
        make_picture_backbone(folder / "backbone", dataclasses.replace(settings, seed=settings.seed + seed))
    for stage in STAGES:
        train(stage_config(stage, folder, scale, seed))
    return build_report(folder, STAGES)
