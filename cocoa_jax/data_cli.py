"""``cocoa data``: one thin sub-command per verb, no logic."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, Namespace

EXAMPLES = {
    "inspect": "cocoa data inspect --config configs/demo/2-bridge.yaml --checkpoint=runs/backbone --output=page.html",
    "check": "cocoa data check --config configs/demo/2-bridge.yaml --checkpoint=runs/backbone --output=bad.json",
}
Command = Callable[[str, str, bool], ArgumentParser]


def add_commands(parser: ArgumentParser, command: Command) -> None:
    """Add the sub-commands to the parser of ``cocoa data``; ``command`` makes a parser of (example, text, config)."""
    from cocoa_jax.config import TrainConfig

    verbs = parser.add_subcommands(dest="verb", metavar="VERB")
    inspect = command(
        EXAMPLES["inspect"], "Draw real rows of a stage as a page, `output`: tokens, pictures, visibility.", True
    )
    inspect.add_argument("--step", type=int, default=0, help="whose batch is drawn")
    inspect.add_argument("--rows", type=int, default=4, help="how many of its rows are drawn")
    inspect.add_class_arguments(TrainConfig)
    verbs.add_subcommand("inspect", inspect, help=inspect.description)

    check = command(
        EXAMPLES["check"], "Read and decode every record and list the bad ones in `output`, for data.bad.known.", True
    )
    check.add_class_arguments(TrainConfig)
    verbs.add_subcommand("check", check, help=check.description)


def run(chosen: Namespace, instantiate: Callable[[], Any]) -> None:
    """Carry out ``cocoa data VERB``; ``instantiate`` gives the parsed settings as objects."""
    from cocoa_jax.config import TrainConfig
    from cocoa_jax.training.data_reports import check_data, inspect_data

    made = vars(instantiate()[chosen.verb])
    config = TrainConfig(**{name: made[name] for name in TrainConfig.__dataclass_fields__})
    if chosen.verb == "inspect":
        inspect_data(config, made["step"], made["rows"])
        sys.stdout.write(f"page: {config.output}\n")
    elif chosen.verb == "check":
        checked, bad = check_data(config)
        sys.stdout.write(f"{bad} of {checked} records are bad: {config.output}\n")
