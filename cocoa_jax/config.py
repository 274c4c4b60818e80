"""Everything that a run can be told, one frozen dataclass per concern; the only reader of settings files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser

from cocoa_jax.checkpoints.places import is_remote
from cocoa_jax.checkpoints.scratch import ScratchConfig
from cocoa_jax.data.bad import BadConfig
from cocoa_jax.data.masking import MaskingConfig
from cocoa_jax.data.mixture import MixtureConfig
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.pipeline import BatchConfig, Stage, VisibilityConfig
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.models.lora import LoraConfig
from cocoa_jax.models.qwen2_vl import Compute
from cocoa_jax.objectives.contrastive import ContrastiveConfig, tokens_of
from cocoa_jax.objectives.embedding import Pooling
from cocoa_jax.objectives.similarity import Tokens
from cocoa_jax.objectives.warmup import WarmupConfig

Config = TypeVar("Config")


class SettingsError(ValueError):
    """A settings file that cannot be read, or settings that contradict each other."""


def _at_least(least: int, section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:  # which NaN is not either
            raise SettingsError(f"{section}.{name} is {value}: the least is {least}, give that or more")


def _above_zero(section: str, config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise SettingsError(f"{section}.{name} is {getattr(config, name)}: give a number above 0")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on and how it becomes batches.

    Args:
        kinds: kinds of records of the embedded pictures and their weights, see ``cocoa_jax.data.pairs``.
        mixture: a file of data sets, see ``cocoa_jax.data.mixture``, in place of kinds.
        split: split of the embedded pictures.
        mirror: whether the embedded pictures may be flipped from left to right.
        labelled: share of what the embedded pictures show of which records are made; null for all.
        processor: text and picture settings.
        rows: shapes of a batch.
        visibility: what tokens see.
        masking: what is hidden in stages 1 and 2; null in stage 3.
        negatives: hard negatives of each record in stage 3, at most 8, or as many as it has: one that it lacks is no
            negative.
        interleave: in how many equal parts a batch of stage 3 is drawn, each from one data set.
        bad: what happens to records that cannot be used.
        decoded_mib: MiB of memory in which pictures stay decoded, for data that is seen many times and fits.
        threads: threads that build batches ahead, two each, or fewer where batches are so large that those of a host
            would take more than 32 GiB.
        workers: processes with so many threads each, which share the 32 GiB but have two batches each in any case; 0
            for none.
    """

    processor: ProcessorConfig
    rows: RowsConfig
    kinds: dict[str, float] = dataclasses.field(default_factory=dict)
    mixture: str | None = None
    split: Literal["train", "validation"] = "train"
    mirror: bool = True
    labelled: float | None = None
    visibility: VisibilityConfig = VisibilityConfig()  # noqa: RUF009
    masking: MaskingConfig | None = None
    negatives: int = 0
    interleave: int = 1
    bad: BadConfig = BadConfig()  # noqa: RUF009
    decoded_mib: int = 0
    threads: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if bool(self.kinds) == bool(self.mixture):
            raise SettingsError(f"kinds is {self.kinds} and mixture {self.mixture}: give one of the two")
        if self.labelled is not None and (self.mixture or not 0 < self.labelled <= 1):
            raise SettingsError(f"labelled is {self.labelled}: give a share of the embedded pictures, above 0 up to 1")
        _at_least(0, "data", self, "decoded_mib", "threads", "workers")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on one of the first three takes what the others leave.

    Args:
        data: rows of the batch are spread over them, parameters are whole on each.
        fsdp: rows and parameters are spread over them.
        tensor: heads, inner widths and the vocabulary are.
        slice: TPU slices, joined by the data-centre network, over which rows are spread as over data; -1 takes all
            that there are.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slice: int = -1


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of one run, one a host.

    Args:
        mode: ``on``, ``off``, or ``detect``, which joins the hosts of a pod on GKE and of several slices.
        coordinator: host and port of process 0, for clusters that JAX does not know; else JAX_COORDINATOR_ADDRESS.
        processes: how many there are; else JAX_NUM_PROCESSES.
        process: which one this is, from 0; else JAX_PROCESS_ID.
        heartbeat: seconds without a sign of life after which a process counts as dead and the others end.
        start: seconds to wait for all to start.
    """

    mode: Literal["detect", "on", "off"] = "detect"
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat: int = 20
    start: int = 600

    def __post_init__(self) -> None:
        _at_least(1, "distributed", self, "processes", "heartbeat", "start")
        _at_least(0, "distributed", self, "process")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the paper: no decay, gradients clipped to a global norm.

    ``schedule`` is what follows the linear warm-up: ``linear`` or ``cosine`` down to zero, ``constant``, or ``wsd``,
    constant and then down to zero in a line over the last ``decay_steps`` (a tenth of the run where null).
    ``ema`` is the decay of a moving average of what trains, null for none. Where there is one, it is what the stage
    hands on (to the next stage, to embeddings, to exports); training itself goes on from the weights as they are.
    ``head_rate`` multiplies the rate of what trains beside the backbone: a head that starts from nothing may need
    more than a backbone that must not be shaken.
    """

    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    head_rate: float = 1.0
    decay_steps: int | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        _above_zero("optimizer", self, "learning_rate", "eps", "clip")
        _at_least(0, "optimizer", self, "warmup_steps", "weight_decay", "head_rate")
        for name, value in (("b1", self.b1), ("b2", self.b2)):
            if not 0 <= value < 1:
                raise SettingsError(f"optimizer.{name} is {value}: give a decay from 0 to below 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise SettingsError(f"optimizer.ema is {self.ema}: give a decay between 0 and 1, such as 0.999, or null")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of a run: ``steps`` of them, the first being step ``first`` (from 0)."""

    first: int
    steps: int = 3

    def __post_init__(self) -> None:
        if self.first < 0 or self.steps < 1:
            raise SettingsError(f"loop.profile is {self.steps} steps from {self.first}: at least 1 from 0 or later")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length of a run and what it leaves behind.

    Args:
        steps: updates in all.
        checkpoint_every: steps from one checkpoint to the next.
        keep: how many of them are kept.
        profile: steps to record for TensorBoard's profile plugin or xprof, in the folder ``trace`` of the stage.
        compilation_cache: folder, also in a bucket, of compiled programs, for runs of the same settings to begin
            faster; null compiles anew.
        wandb: project of Weights & Biases that gets the metrics too; needs the extra ``wandb``.
    """

    steps: int
    checkpoint_every: int = 100
    keep: int = 2
    profile: ProfileConfig | None = None
    compilation_cache: str | None = None
    wandb: str | None = None

    def __post_init__(self) -> None:
        _at_least(1, "loop", self, "steps", "checkpoint_every", "keep")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage of training.

    Args:
        stage: ``warmup`` (1), ``bridge`` (2) or ``contrastive`` (3).
        checkpoint: a Hugging Face folder, or the output of the stage before.
        output: folder of this stage: checkpoints, metrics, config.
        seed: of sampling, masking and noise; the same seed gives the same run. Noise that all hidden units share
            (``warmup.noise``) is a matter of the step alone, and the same with any seed.
        lora: train an adapter on the frozen backbone; null trains all of the backbone.
    """

    stage: Stage
    checkpoint: str
    output: str
    data: DataConfig
    loop: LoopConfig
    seed: int = 0
    compute: Compute = Compute()  # noqa: RUF009
    lora: LoraConfig | None = None
    warmup: WarmupConfig = WarmupConfig()  # noqa: RUF009
    contrastive: ContrastiveConfig = ContrastiveConfig()  # noqa: RUF009
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()

    def batches(self) -> BatchConfig:
        """What the batches of this stage depend on."""
        data = self.data
        return BatchConfig(
            self.stage,
            data.rows,
            data.visibility,
            data.masking,
            data.negatives,
            data.interleave,
            data.bad,
            self.loop.steps,
        )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How a trained model is read: the same pixels, prompts and pooling as in training, and rows of its own.

    ``width`` cuts embeddings to so many numbers a token; null takes them whole.
    """

    processor: ProcessorConfig
    rows: RowsConfig
    visibility: VisibilityConfig = VisibilityConfig()  # noqa: RUF009
    compute: Compute = Compute()  # noqa: RUF009
    mesh: MeshConfig = MeshConfig()
    pooling: Pooling = "bridge"
    tokens: Tokens = "concatenated"
    width: int | None = None

    @property
    def kept_tokens(self) -> int:
        """How many tokens stand side by side in an embedding."""
        return tokens_of(self.pooling, self.tokens, len(self.processor.bridge_tokens))

    def identity(self) -> dict[str, Any]:
        """Plain values of all that an embedding depends on; over which devices the work is spread is no part of it."""
        return {name: value for name, value in to_dict(self).items() if name != "mesh"}

    @property
    def compared_apart(self) -> int:
        """How many tokens of an embedding are compared one by one rather than as one row."""
        return self.kept_tokens if self.tokens == "max_sim" else 1


# Beside the tokenizer of a stage and of what is exported from it: the EvaluateConfig with which to read it as trained.
READING = "cocoa.json"


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """A small backbone made from scratch."""

    backbone: ScratchConfig = ScratchConfig()  # noqa: RUF009


def evaluate_config_of(trained: Mapping[str, Any]) -> EvaluateConfig:
    """How a stage that was trained with these settings (``to_dict``) is to be read: the same pixels and visibility.

    Weights lie on the devices as in training: where they did not fit one device, they do not now.
    """
    data = trained["data"]
    fields = {"processor": data["processor"], "rows": data["rows"], "visibility": data["visibility"]}
    # Stages that were trained before there was a choice have none of these.
    chosen = {name: trained["contrastive"][name] for name in ("pooling", "tokens") if name in trained["contrastive"]}
    return parse(EvaluateConfig, {**fields, "compute": trained["compute"], "mesh": trained["mesh"], **chosen})


def parse(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A config from plain values, with every type checked; the same object for the same values.

    Raises:
        SettingsError: an unknown key, or a value of the wrong type.
    """
    # To parse takes a tenth of a second, and a study parses the same stages hundreds of times.
    parsed: Config = _parsed(kind, json.dumps(values, default=str))  # type: ignore[arg-type]  # a class has a hash
    return parsed


@lru_cache
def _parser(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it")
    return parser


@lru_cache(maxsize=1024)
def _parsed(kind: Any, values: str) -> Any:
    parser = _parser(kind)
    try:
        return parser.instantiate(parser.parse_object({"it": json.loads(values)})).it
    except Exception as error:  # jsonargparse raises its own and argparse's
        raise SettingsError(str(error)) from error


def load_config(kind: type[Config], path: str | Path) -> Config:
    """A config from a YAML file.

    Raises:
        SettingsError: the file is missing, is no YAML, or holds unknown keys or values of the wrong type.
    """
    return parse(kind, read_settings(path))


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, by name.

    Raises:
        SettingsError: the file is missing, is no YAML, or holds no settings.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        why = f"{path} cannot be read ({error})"
        raise SettingsError(f"{why}: give a settings file, such as those in configs/") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds a {type(values).__name__}, expected settings by name")
    return values


def load_mixture(path: str | Path) -> MixtureConfig:
    """A mixture from its YAML file; its relative paths begin in the folder of the file.

    Raises:
        SettingsError: the file cannot be read or holds unknown keys or values of the wrong type, or a bucket as root.
    """
    config = load_config(MixtureConfig, find_config(str(path)))
    if is_remote(config.root):
        raise SettingsError(
            f"{path}: root is {config.root}: give a folder of this machine; in a bucket only prepared data are read, "
            "whose `path` names them in full"
        )
    return dataclasses.replace(config, root=str(Path(path).resolve().parent / config.root))


def named_config(name: str) -> Path:
    """A file of the ``configs`` folder that came with the package, such as ``demo/1-warmup.yaml``.

    Raises:
        SettingsError: there is none of that name.
    """
    path = _configs() / name
    if not path.is_file():
        raise SettingsError(f"configs/{name} is not installed: reinstall the package")
    return path


def find_config(path: str) -> Path:
    """``path`` itself, or, where there is no such file, the one of that name that came with the package."""
    own = Path(path)
    ours = _configs().parent / path
    return ours if not own.exists() and own.parts[:1] == ("configs",) and ours.is_file() else own


def _configs() -> Path:
    package = Path(__file__).parent
    # An installed package carries the folder inside; in a source checkout it stands beside the package.
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, as it is written beside what it made."""
    return _plain(dataclasses.asdict(config))


def differences(mine: Any, other: Any, prefix: str = "") -> list[str]:
    """Where two configs written by ``to_dict`` differ: ``field: this, that``."""
    if not (isinstance(mine, dict) and isinstance(other, dict)):
        return [] if mine == other else [f"{prefix}: {mine!r}, {other!r}"]
    found = []
    for key in sorted(mine.keys() | other.keys()):
        found += differences(mine.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
