"""One CPU device for every test; programs for several devices run in a process of their own."""

import json
import os
import shutil

# Before JAX starts; processes that the tests start inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Examples that compile something take as long as they take; the suite has a timeout of its own.
settings.register_profile("cocoa", deadline=None)
settings.load_profile("cocoa")

TEXTS = ["a kiwi fruit", "the red car on a green hill", "face with tears of joy", "two small boats", "dark skin tone"]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Files made by Hugging Face models, see make_golden.py beside them."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments) -> exit status of `cocoa`, what went to stdout, what went to stderr."""
    from cocoa_jax import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        status = 0
        try:
            cli.main([str(part) for part in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL of 75 thousand parameters in Hugging Face form; not to be written to."""
    from cocoa_jax.checkpoints.scratch import ScratchConfig, make_backbone
    from cocoa_jax.models.qwen2_vl import abstract_params

    sizes = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
    vision = {"vision_width": 16, "vision_layers": 2, "vision_heads": 2, "vision_mlp_ratio": 2}
    folder = tmp_path_factory.mktemp("tiny") / "backbone"
    make_backbone(folder, ScratchConfig(vocab_size=384, **sizes, **vision), TEXTS * 20, abstract_params)
    return folder


@pytest.fixture(scope="session")
def published(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one is published: its tokenizer has no mask token, whose row is unused; not to be written to."""
    folder = Path(shutil.copytree(backbone, tmp_path_factory.mktemp("published") / "backbone"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<|mask|>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    known = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"] = {row: token for row, token in known.items() if token["content"] != "<|mask|>"}
    settings["additional_special_tokens"].remove("<|mask|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def stage_settings() -> Callable[..., dict[str, Any]]:
    """Settings of a short run of a stage on few, small pictures, as they stand in a YAML file."""

    def make(stage: str, checkpoint: Path, output: Path, **more: Any) -> dict[str, Any]:
        kinds = {"warmup": "warmup", "bridge": "bridge", "contrastive": "caption"}
        rows = {"batch_size": 8, "examples_per_row": 2, "masked_per_row": 8}
        data = {
            "kinds": {kinds[stage]: 1.0},
            "split": "validation",
            "processor": {"min_pixels": 784, "max_pixels": 8 * 784, "max_text_tokens": 16},
            "rows": {**rows, "shapes": [[16 if stage == "contrastive" else 8, 48, 32]]},
        }
        if stage != "contrastive":
            data["masking"] = {"text_ratio": 0.5, "image_ratio": 0.5 if stage == "warmup" else 0.0}
        settings = {
            "stage": stage,
            "checkpoint": str(checkpoint),
            "output": str(output),
            "seed": 3,
            "data": data,
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
            "loop": {"steps": 10, "checkpoint_every": 2},
        }
        return {**settings, **more}

    return make


@pytest.fixture(scope="session")
def leave_stage() -> Callable[[dict[str, Any]], Path]:
    """Leaves the folder of a stage with these settings as training does, with the weights that it began with."""
    from cocoa_jax.checkpoints.backbone import open_backbone
    from cocoa_jax.checkpoints.orbax import StageCheckpoints
    from cocoa_jax.config import TrainConfig, parse, to_dict
    from cocoa_jax.data.mixture import Mixture
    from cocoa_jax.training.folder import prepare

    def leave(settings: dict[str, Any]) -> Path:
        folder, origin = Path(settings["output"]), open_backbone(settings["checkpoint"])
        config = parse(TrainConfig, settings)
        prepare(config, Mixture({}, {}, {}), origin)
        metadata = {"stage": settings["stage"], "config": to_dict(config), "parent": origin.origin()}
        state: dict[str, Any] = {"params": origin.load(), "head": {}, "optimizer": {}, "loop": {"step": 1}}
        with StageCheckpoints(folder, keep=1) as checkpoints:
            checkpoints.save(1, **state, metadata=metadata, wait=True)
        return folder

    return leave


@pytest.fixture(scope="session")
def trained(
    backbone: Path,
    stage_settings: Callable[..., dict[str, Any]],
    leave_stage: Callable[[dict[str, Any]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a stage 3; not to be written to."""
    folder = tmp_path_factory.mktemp("trained") / "3-contrastive"
    return leave_stage(stage_settings("contrastive", backbone, folder))
