"""``cocoa data synthesize``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command
from cocoa_jax.config import load_mixture
from cocoa_jax.data.naming import NAMES
from cocoa_jax.data.synthesis.endpoint import EndpointConfig
from cocoa_jax.data.synthesis.pictures import open_subjects
from cocoa_jax.data.synthesis.plan import TextsConfig
from cocoa_jax.data.synthesis.run import synthesize


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=f"a folder of pictures, {NAMES}")
    parser.add_argument("--output", required=True, help="local folder of rows, pictures and mixture.yaml")
    parser.add_argument("--estimate", action="store_true", help="say what it would cost and ask nothing")
    parser.add_class_arguments(EndpointConfig, "endpoint")
    parser.add_class_arguments(TextsConfig, "texts")


def _run(given: Namespace) -> None:
    mixtures = {name: load_mixture(name) for name in given.sources if name.endswith((".yaml", ".yml"))}
    sources = open_subjects(given.sources, mixtures)
    made = synthesize(
        sources, given.endpoint, given.texts, Path(given.output), lambda line: sys.stderr.write(f"{line}\n"),
        estimate_only=given.estimate,
    )  # fmt: skip
    sys.stdout.write("\n".join(made.lines()) + "\n")


SYNTHESIZE = Command(
    about="Have a vision-language model behind an OpenAI-compatible endpoint write texts about pictures, for stage 2.",
    example="cocoa data synthesize photos --output synthetic --endpoint.url http://localhost:8000/v1 "
    "--endpoint.model Qwen/Qwen2.5-VL-7B-Instruct --texts.languages '[en, de]' --texts.limit 10000",
    options=_options,
    run=_run,
    config=True,
    local=("output",),
)
