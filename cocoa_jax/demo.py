"""The main job on the embedded pictures: the recipe of the method at one of two lengths."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cocoa_jax.config import named_config
from cocoa_jax.recipe import Recipe, read_recipe, run_recipe

STAGES = ("1-warmup", "2-bridge", "3-contrastive")
# Steps of each stage: fixed numbers, so that a run can be repeated and continued; None takes the config files' own.
SCALES = {"small": (10, 10, 80), "standard": None}


def demo_recipe(output: str | Path, seed: int) -> Recipe:
    """The recipe of the demo with its folder and seed."""
    recipe = read_recipe(named_config("recipes/pictures/cocoa.yaml"))
    return dataclasses.replace(recipe, output=str(output), seed=seed)


def run_demo(output: str | Path, scale: str, seed: int) -> Path:
    """Backbone, three stages, evaluation and report; a part that is done is not done again. Returns the report."""
    report = run_recipe(demo_recipe(output, seed), SCALES[scale])
    assert report is not None  # the recipe scores the pictures
    return report
