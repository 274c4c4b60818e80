"""``cocoa data build`` and ``cocoa data bench``."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.commands.command import Command
from cocoa_jax.config import load_mixture
from cocoa_jax.data.naming import NAMES, open_named
from cocoa_jax.data.prepare import BuildConfig, build, summary
from cocoa_jax.data.processor import Processor, ProcessorConfig


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
            made = build(named.name, named.source, named.contents, processor, given.output, given.build, named.made_for)
            sys.stdout.write(f"{summary(made)}\n")


BUILD = Command(
    about="Bring data sets to the working resolution, in ArrayRecord files beside lengths to plan rows from.",
    example="cocoa data build mixture.yaml --checkpoint CHECKPOINT --output prepared --processor.resolution=square:448",
    options=_build_options,
    run=_build,
    config=True,
)
