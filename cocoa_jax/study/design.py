"""A study as data: arms are recipes with changes, questions compare arms, and pieces are the runs that they need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from cocoa_jax.config import InitConfig, MeshConfig, SettingsError, TrainConfig, named_config, parse, to_dict
from cocoa_jax.recipe import Recipe, merged_file, overlaid, read_recipe, stage_configs

SEARCH_SPLITS, TEST_SPLITS = ("validation",), ("test_seen", "test_unseen")
LAST = "3-contrastive"
# Settings that there were not when stages were first named, with what was done before: names stay as they were.
_ADDED = {("compute", "chunk_remat"): True}
_ONE_DEVICE = MeshConfig(slice=1)  # in names of stages, for every mesh: how a run is spread changes nothing it makes


@dataclasses.dataclass(frozen=True)
class Arm:
    """A recipe with changes.

    Args:
        recipe: its name among the recipes of the pictures.
        about: what a reader is told, in a few words.
        stages: changes of its stages.
        backbone: changes of the study's backbone; the rate stays that of the recipe.
        compute: an arm whose total FLOPs this one spends, by more steps of its last stage.
        rate: multiplies the learning rate that the search found for the recipe.
        width: to which embeddings are cut before they are compared; null takes them whole.
    """

    recipe: str
    about: str = ""
    stages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    backbone: dict[str, Any] = dataclasses.field(default_factory=dict)
    compute: str | None = None
    rate: float = 1.0
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """Arms that are compared with the first of them over so many seeds.

    Questions of an earlier ``wave`` are answered first; those of one wave together, seed by seed.

    Args:
        pairs: of its arms, the first less the second, where that says more than less the first of all.
    """

    about: str
    arms: tuple[str, ...]
    seeds: int
    wave: int = 0
    pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        others = sorted({arm for pair in self.pairs for arm in pair} - set(self.arms))
        if others:
            raise SettingsError(f"pairs name {others}, not among the arms {list(self.arms)}: add them to the arms")


@dataclasses.dataclass(frozen=True)
class Study:
    """What a file of a study says.

    Args:
        backbone: changes of the backbone of the recipes.
        stages: changes of every recipe's stages; an arm's own come after them.
        rates: learning rates of the last stage that every recipe is tried with, on validation tasks.
        queries: at most so many queries of a task, for a quick look; null for all.
    """

    backbone: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    rates: tuple[float, ...]
    arms: dict[str, Arm]
    questions: dict[str, Question]
    queries: int | None = None

    def __post_init__(self) -> None:
        used = {name for question in self.questions.values() for name in question.arms}
        unknown = sorted((used | {arm.compute for arm in self.arms.values() if arm.compute}) - set(self.arms))
        if unknown:
            raise SettingsError(f"arms {unknown} are not described: describe them among arms, or do not name them")
        if not self.rates:
            raise SettingsError("rates is empty: give one learning rate or more")
        if not used:
            raise SettingsError("questions name no arm: give a question with one arm at least")

    @property
    def recipes(self) -> tuple[str, ...]:
        """Recipes that any arm of a question uses, in order."""
        used = [self.arms[name].recipe for question in self.questions.values() for name in question.arms]
        return tuple(dict.fromkeys(used))


@dataclasses.dataclass(frozen=True)
class Piece:
    """One run with its scores: a try of a rate on validation tasks, or an arm on the test tasks.

    ``rate`` is None where it is what the search finds.
    """

    arm: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.arm}-{self.seed}" if self.rate is None else f"search-{self.arm}-{self.rate:g}"

    @property
    def splits(self) -> tuple[str, ...]:
        """What it is scored on."""
        return TEST_SPLITS if self.rate is None else SEARCH_SPLITS


def load_study(name: str) -> Study:
    """The study of this name, such as ``pictures``, its file over the one that it names as its ``base``.

    Raises:
        SettingsError: there is none, or it is no study.
    """
    return parse(Study, merged_file(named_config(f"study/{name}.yaml")))


def pieces(study: Study, only: tuple[str, ...] = (), seeds: int | None = None) -> list[Piece]:
    """Every piece once, the most telling first: the search, then seed by seed the questions in their order.

    Args:
        only: names of questions; none for all.
        seeds: at most so many of a question; null for all.

    Raises:
        SettingsError: a question that there is not, no seeds.
    """
    if seeds is not None and seeds < 1:
        raise SettingsError(f"seeds {seeds}: give 1 or more")
    if unknown := sorted(set(only) - set(study.questions)):
        raise SettingsError(f"questions {unknown} do not exist: choose among {', '.join(study.questions)}")
    asked = {name: question for name, question in study.questions.items() if not only or name in only}
    recipes = dict.fromkeys(study.arms[arm].recipe for question in asked.values() for arm in question.arms)
    found = [Piece(recipe, 0, rate) for recipe in recipes for rate in study.rates] if len(study.rates) > 1 else []
    places: dict[Piece, tuple[int, int]] = {}
    for question in asked.values():
        for seed in range(question.seeds)[:seeds]:
            for arm in question.arms:
                piece = Piece(arm, seed)
                places[piece] = min(places.get(piece, (question.wave, seed)), (question.wave, seed))
    return found + sorted(places, key=lambda piece: places[piece])


def arm_of(study: Study, piece: Piece) -> Arm:
    """What a piece runs: of a try the bare recipe."""
    return Arm(piece.arm) if piece.rate is not None else study.arms[piece.arm]


def best_rate(rates: Iterable[float], means: Mapping[float, float]) -> float | None:
    """The rate with the best mean, the first of equals; None where none was tried."""
    return max((rate for rate in rates if rate in means), key=lambda rate: means[rate], default=None)


def equal_steps(total: float, before: float, each: float) -> int:
    """Steps of a last stage that spend, with what was spent before it, as many FLOPs as another arm in all.

    Args:
        total: FLOPs of the other arm; before: of the stages before the last; each: of a step of the last.
    """
    return max(1, round((total - before) / each))


def recipe_of(study: Study, arm: Arm, seed: int, rate: float) -> Recipe:
    """The recipe that an arm is at a seed and a learning rate of its last stage; its folders are set elsewhere."""
    recipe = _recipe(arm.recipe)
    rated = {LAST: {"optimizer": {"learning_rate": rate * arm.rate}}}
    stages = {
        name: overlaid(
            overlaid(overlaid(own, study.stages.get(name, {})), rated.get(name, {})), arm.stages.get(name, {})
        )
        for name, own in recipe.stages.items()
    }
    if unknown := sorted(set(arm.stages) - set(recipe.stages)):
        names = [name for name, one in study.arms.items() if one == arm]
        raise SettingsError(
            f"arms {names} change the stages {unknown}, which the recipe {arm.recipe} has not: choose among "
            f"{', '.join(recipe.stages)}"
        )
    assert recipe.init is not None  # the pictures' recipes begin from scratch
    init = parse(InitConfig, overlaid(to_dict(recipe.init), {"backbone": overlaid(study.backbone, arm.backbone)}))
    backbone = dataclasses.replace(init.backbone, seed=init.backbone.seed + seed)
    return dataclasses.replace(recipe, stages=stages, init=InitConfig(backbone), seed=seed)


@lru_cache
def _recipe(name: str) -> Recipe:
    return read_recipe(named_config(f"recipes/pictures/{name}.yaml"))


def chain(recipe: Recipe, folder: Path) -> tuple[Path, list[TrainConfig]]:
    """The backbone's folder and the stages, each in a folder named by all that it depends on: equal stages are shared.

    Args:
        folder: of the study.
    """
    assert recipe.init is not None
    made_of: list[Any] = [to_dict(recipe.init)]
    backbone = folder / "backbones" / identity(made_of)
    configs, before = [], backbone
    for config in stage_configs(recipe):
        values = to_dict(dataclasses.replace(config, checkpoint="", output="", mesh=_ONE_DEVICE))
        for (section, name), before_it in _ADDED.items():
            if values[section][name] == before_it:
                del values[section][name]
        made_of.append(values)
        output = folder / "stages" / f"{config.stage}-{identity(made_of)}"
        configs.append(dataclasses.replace(config, checkpoint=str(before), output=str(output)))
        before = output
    return backbone, configs


def identity(values: Any) -> str:
    """Twelve hex digits over plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The same with so many steps of its last stage."""
    last = list(recipe.stages)[-1]
    stages: Mapping[str, Any] = {**recipe.stages, last: overlaid(recipe.stages[last], {"loop": {"steps": steps}})}
    return dataclasses.replace(recipe, stages=dict(stages))
