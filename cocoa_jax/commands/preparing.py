"""``cocoa data build`` and ``cocoa data bench``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.chips import CHIPS
from cocoa_jax.commands.command import Command, fields
from cocoa_jax.config import TrainConfig, find_config, load_mixture
from cocoa_jax.data.naming import NAMES, open_named
from cocoa_jax.data.prepare import BuildConfig, build, drawn_once, summary
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.models.config import read_config
from cocoa_jax.training.data_speed import chips_fed, measure_data


def _build_options(parser: ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=NAMES)
    parser.add_argument("--output", required=True, help="folder to hold a folder for each data set; local or gs://")
    parser.add_argument("--checkpoint", required=True, help="whose tokenizer and picture settings count: a folder")
    parser.add_class_arguments(ProcessorConfig, "processor")
    parser.add_class_arguments(BuildConfig, "build")


def _build(given: Namespace) -> None:
    backbone = open_backbone(given.checkpoint)
    processor = Processor.load(backbone.side_files, backbone.config, given.processor)
    for words in given.sources:
        mixture = load_mixture(words) if words.endswith((".yaml", ".yml")) else None
        for named in open_named(words, mixture):
            if told := drawn_once(named.source):
                sys.stdout.write(f"{told}\n")
            made = build(named.name, named.source, named.contents, processor, given.output, given.build, named.made_for)
            sys.stdout.write(f"{summary(made)}\n")


UTILISATION = 0.4  # share of its peak that a chip is taken to reach


def _bench_options(parser: ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=10.0, help="how long batches are made")
    parser.add_argument(
        "--model", default=None, help="folder whose config.json is the model to feed; default: the checkpoint"
    )
    parser.add_class_arguments(TrainConfig)


def _bench(given: Namespace) -> None:
    settings = fields(given)
    seconds, model = settings.pop("seconds"), settings.pop("model")
    config = TrainConfig(**settings)
    speed = measure_data(config, seconds)
    sys.stdout.write("\n".join(speed.lines()) + "\n")
    folder = find_config(f"{model}/config.json").parent if model else Path(open_backbone(config.checkpoint).side_files)
    sizes = read_config(folder)
    for chip in CHIPS.values():
        fed = chips_fed(speed, sizes, chip.peak_flops, UTILISATION)
        sys.stdout.write(
            f"static model: one such host feeds {fed:.2f} {chip.name} devices training {folder.name} "
            f"at {UTILISATION:.0%} of their peak\n"
        )


BENCH = Command(
    about="Make batches as a stage would: rows a second, how full they are, and how many chips that feeds.",
    example="cocoa data bench --config configs/demo/3-contrastive.yaml --checkpoint=runs/demo/backbone --seconds=10",
    options=_bench_options,
    run=_bench,
    config=True,
)
BUILD = Command(
    about="Bring data sets to the working resolution, in ArrayRecord files beside lengths to plan rows from.",
    example="cocoa data build mixture.yaml --checkpoint CHECKPOINT --output prepared --processor.resolution=square:672",
    options=_build_options,
    run=_build,
    config=True,
)
