"""``cocoa data inspect`` and ``cocoa data check``."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command, fields
from cocoa_jax.config import TrainConfig
from cocoa_jax.evaluation.data_reports import check_data, inspect_data


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("--step", type=int, default=0, help="whose batch is drawn")
    parser.add_argument("--show", type=int, default=4, help="how many of its rows are drawn")
    parser.add_class_arguments(TrainConfig)


def _inspect(given: Namespace) -> None:
    settings = fields(given)
    step, show = settings.pop("step"), settings.pop("show")
    config = TrainConfig(**settings)
    inspect_data(config, step, show)
    sys.stdout.write(f"page: {config.output}\n")


def _check(given: Namespace) -> None:
    config = TrainConfig(**fields(given))
    checked, bad = check_data(config)
    sys.stdout.write(f"{bad} of {checked} records are bad: {config.output}\n")


INSPECT = Command(
    about="Draw real rows of a stage as a page, `output`: tokens, pictures, visibility, packing.",
    example="cocoa data inspect --config configs/demo/2-bridge.yaml --checkpoint=runs/backbone --output=page.html",
    options=_inspect_options,
    run=_inspect,
    config=True,
)
CHECK = Command(
    about="Read and decode every record of a stage and list the bad ones in `output`, for data.bad.known.",
    example="cocoa data check --config configs/demo/2-bridge.yaml --checkpoint=runs/backbone --output=bad.json",
    options=lambda parser: parser.add_class_arguments(TrainConfig),
    run=_check,
    config=True,
)
