"""Recipes: all stages of a run in one file, done one after the other, each from the checkpoint of the one before."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from cocoa_jax.checkpoints.orbax import newest_first, steps_folder
from cocoa_jax.checkpoints.places import folder_at, is_remote
from cocoa_jax.checkpoints.scratch import ScratchConfig, make_backbone
from cocoa_jax.config import (
    DistributedConfig,
    InitConfig,
    SettingsError,
    TrainConfig,
    find_config,
    load_mixture,
    parse,
    read_settings,
    to_dict,
)
from cocoa_jax.data.mixture import open_mixture
from cocoa_jax.data.prompts import INSTRUCTIONS, plain
from cocoa_jax.data.readers.ranked import open_ranked
from cocoa_jax.data.sources import SourceError, load_pictures
from cocoa_jax.evaluation.collect import REPORT, build_report
from cocoa_jax.evaluation.set_page import write_set_report
from cocoa_jax.evaluation.sets import MMEB, Sets, evaluate_sets, named_sets
from cocoa_jax.models.qwen2_vl import abstract_params
from cocoa_jax.training.hosts import peers
from cocoa_jax.training.inputs import known_bad, open_sources
from cocoa_jax.training.loop import train

PICTURES = "pictures"
EVALUATION = "evaluation"  # the folder of scores of sets
_BASE, _FROM, _EPOCHS = "base", "from", "epochs"
_ONE = (
    "and a recipe is run by one process into a folder of this machine: write its stages as files (cocoa run --write "
    "FOLDER) and give them to launch/pipeline.sh or launch/stages.sh, which take gs:// paths and several hosts"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe file says.

    Args:
        output: folder of everything that the run makes.
        stages: settings of each stage by the name of its folder, in order, as in a file of a stage but without
            ``checkpoint`` and ``output``. ``from`` names a file to begin with, ``epochs`` stands for ``loop.steps``.
        checkpoint: the folder to begin with; or
        init: a small backbone to make from scratch.
        tasks: what the last stage is scored on: ``pictures``, ``mmeb-v1``, a file of sets; null for nothing.
        seed: added to the seed of the backbone, and a thousand times to those of the stages.
        data: where the relative paths of the mixtures begin.
        evaluation_data: the same for ``tasks``; without it MMEB is not scored.
    """

    output: str
    stages: dict[str, dict[str, Any]]
    checkpoint: str | None = None
    init: InitConfig | None = None
    tasks: str | None = PICTURES
    seed: int = 0
    data: str | None = None
    evaluation_data: str | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.init is None):
            raise SettingsError(f"checkpoint is {self.checkpoint}, init {self.init}: a recipe begins with one of them")
        for name, place in {"data": self.data, "evaluation_data": self.evaluation_data}.items():
            if is_remote(place or ""):
                raise SettingsError(
                    f"{name} is {place}: give a path of this machine; in a bucket only prepared data are "
                    "read, which a mixture names in full"
                )
        if not self.stages:
            raise SettingsError("stages is empty: a recipe has one stage at least")


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from its YAML file, merged over those that it names as its ``base``; a stage that is null is left out.

    Raises:
        SettingsError: a file is missing, is no YAML, or holds unknown keys or values of the wrong type.
    """
    values = merged_file(find_config(str(path)))
    stages = {name: _stage(stage) for name, stage in (values.get("stages") or {}).items() if stage is not None}
    init = values.get("init")
    return parse(Recipe, {**values, "stages": stages, **({"init": _stage(init)} if init else {})})


def stage_configs(
    recipe: Recipe, steps: tuple[int, ...] | None = None, files: str | Path | None = None
) -> list[TrainConfig]:
    """The settings of every stage with its folders.

    Args:
        steps: of each stage, in place of its own (no epochs are counted); warm-up then takes half of them at most.
        files: folder for the mixtures whose data lie where the recipe says; None for that of the run.

    Raises:
        SettingsError: settings that are unknown or contradict each other.
    """
    folder = folder_at(recipe.output)
    configs, before = [], recipe.checkpoint or str(folder / "backbone")
    if steps is not None and len(steps) != len(recipe.stages):
        raise SettingsError(f"{len(steps)} numbers of steps for {len(recipe.stages)} stages: give one a stage")
    for number, (name, settings) in enumerate(recipe.stages.items()):
        output = str(folder / name)
        settings = {**settings, "checkpoint": before, "output": output}
        if steps is not None:
            settings = {**settings, "loop": {**settings.get("loop", {}), "steps": steps[number]}, _EPOCHS: None}
        config = _stage_config(recipe, settings, Path(files or recipe.output))
        if steps is not None:
            warmup = min(config.optimizer.warmup_steps, steps[number] // 2)
            config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup))
        configs.append(dataclasses.replace(config, seed=config.seed + 1000 * recipe.seed))
        before = output
    return configs


def run_recipe(recipe: Recipe, steps: tuple[int, ...] | None = None) -> Path | None:
    """Runs what is not done yet: the backbone, every stage, the scores; returns the report, None where there is none.

    Raises:
        SettingsError: a folder that was made with other settings, an output in a bucket, or several processes;
            SourceError: data of any stage or sets to score that cannot be opened, before a stage is trained; whatever
            training and scoring raise.
    """
    if is_remote(recipe.output):
        raise SettingsError(f"output is {recipe.output}, {_ONE}")
    # Asked before the settings of the stages are made, for which files are written and data counted. Hosts of a pod
    # outside of GKE have nothing in their environment that tells of the others; JAX asks the TPU.
    told = [parse(DistributedConfig, stage.get("distributed") or {}) for stage in recipe.stages.values()]
    if any(peers(config, os.environ) for config in told) or jax.process_count() > 1:
        raise SettingsError(f"this is one of several processes, {_ONE}")
    configs, sets = stage_configs(recipe, steps), scored_sets(recipe)
    folder, left = Path(recipe.output), [config for config in configs if not is_done(config)]
    if left:
        _require_data(left, sets or {})
    if recipe.init is not None and not (folder / "backbone").is_dir():
        settings = recipe.init.backbone
        make_picture_backbone(folder / "backbone", dataclasses.replace(settings, seed=settings.seed + recipe.seed))
    for config in left:
        train(config)
    if recipe.tasks == PICTURES:
        return build_report(folder, tuple(recipe.stages))
    if sets is None:
        return None
    results = evaluate_sets(configs[-1].output, folder / EVALUATION, sets)
    page = folder / EVALUATION / REPORT
    write_set_report(page, {folder.name: results})
    return page


def scored_sets(recipe: Recipe) -> Sets | None:
    """The sets that the last stage is scored on; None where that is nothing, or the embedded pictures.

    Raises:
        SettingsError: sets that are not there.
    """
    if recipe.tasks in (None, PICTURES) or (recipe.tasks == MMEB and recipe.evaluation_data is None):
        return None
    return named_sets(str(recipe.tasks), recipe.evaluation_data)


def write_stages(recipe: Recipe, folder: str | Path, steps: tuple[int, ...] | None = None) -> list[Path]:
    """The settings of every stage as a file for `cocoa train` and `cocoa plan`; nothing is run.

    Where the recipe says where data lie, its mixtures become files too: in the folder of the run, or beside the stages
    where that is in a bucket.

    Raises:
        SettingsError: as ``stage_configs``; also where epochs are to be counted of data that are not there.
    """
    try:
        configs = stage_configs(recipe, steps, folder if is_remote(recipe.output) else None)
    except SourceError as error:
        raise SettingsError(f"{error}; to write the stages without their data, give --steps of each stage") from error
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder) / f"{name}.yaml" for name in recipe.stages]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    return paths


def is_done(config: TrainConfig) -> bool:
    """Whether the stage's folder holds its last step, made with these very settings."""
    folder = Path(config.output)
    try:
        same = json.loads((folder / "config.json").read_text()) == to_dict(config)
    except OSError:
        return False
    return same and next(newest_first(steps_folder(folder), missing_ok=True), 0) >= config.loop.steps


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


def _require_data(configs: Sequence[TrainConfig], sets: Sets) -> None:
    """See that all can be opened that is read later: days of training may come before it."""
    for config in configs:
        known_bad(config, open_sources(config))
    for name, (chosen, root) in sets.items():
        open_ranked(name, chosen, root)


def _stage_config(recipe: Recipe, settings: dict[str, Any], files: Path) -> TrainConfig:
    settings = dict(settings)
    mixture = settings["data"].get("mixture")
    if mixture and recipe.data is not None:
        settings["data"] = {**settings["data"], "mixture": str(_rooted(mixture, recipe, files))}
    epochs = settings.pop(_EPOCHS, None)
    if epochs is None:
        return parse(TrainConfig, settings)
    settings["loop"] = {"steps": 1, **settings.get("loop", {})}
    config = parse(TrainConfig, settings)
    if config.data.mixture is None:
        raise SettingsError(f"{_EPOCHS} is {epochs} and there is no mixture to count: give loop.steps")
    sources = open_mixture(load_mixture(config.data.mixture), config.stage).sources.values()
    steps = math.ceil(epochs * sum(map(len, sources)) / config.data.rows.batch_size)
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps))


def _rooted(mixture: str, recipe: Recipe, folder: Path) -> Path:
    """The mixture as a file in ``folder``, with its data in the folder that the recipe names."""
    found = find_config(mixture)
    values = {**read_settings(found), "root": str(Path(str(recipe.data)).resolve())}
    path = folder / found.name
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(yaml.safe_dump(values, sort_keys=False))
    os.replace(aside, path)
    return path


def _stage(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over those of the file that they come ``from``."""
    own = dict(settings)
    source = own.pop(_FROM, None)
    if source is None:
        return own
    merged = overlaid({k: v for k, v in read_settings(Path(source)).items() if k not in ("checkpoint", "output")}, own)
    if own.get(_EPOCHS) is not None and "loop" in merged:
        merged["loop"] = {k: v for k, v in merged["loop"].items() if k != "steps"}
    return merged


def merged_file(path: Path) -> dict[str, Any]:
    """A file over those that it names as its ``base``, with the files that stages come from named in full.

    Raises:
        SettingsError: a file is missing, is no YAML, or holds no settings.
    """
    own = read_settings(path)
    bases = own.pop(_BASE, [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = overlaid(merged, merged_file(path.parent / base))
    for part in [*(own.get("stages") or {}).values(), own.get("init")]:
        if isinstance(part, dict) and _FROM in part:
            part[_FROM] = str(path.parent / part[_FROM])
    return overlaid(merged, own)


def overlaid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` upon ``under``, objects key by key; the order is that of their first appearance."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlaid(merged[key], value) if both else value
    return merged
