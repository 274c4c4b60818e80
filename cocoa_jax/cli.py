"""The ``cocoa`` command: one thin sub-command per verb, no logic."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Union

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from cocoa_jax.commands.command import Command

Verbs = Mapping[str, Union["Command", "Verbs"]]


def commands() -> Verbs:
    """Every sub-command by name; a group of verbs is a mapping of its own."""
    # They pull in JAX; they are imported when somebody calls, not when somebody imports this module.
    from cocoa_jax.commands import adapter, convert, reading, training

    return {
        "demo": training.DEMO,
        "init": training.INIT,
        "train": training.TRAIN,
        "evaluate": reading.EVALUATE,
        "embed": reading.EMBED,
        "report": reading.REPORT,
        "adapter": {"export": adapter.EXPORT, "merge": adapter.MERGE},
        "convert": {"hf-to-orbax": convert.TO_ORBAX, "orbax-to-hf": convert.TO_HF},
    }


# What each group of verbs is for.
GROUPS = {
    "adapter": "Write a LoRA or DoRA adapter as PEFT does, or merged into its weights.",
    "convert": "Turn a Hugging Face folder into a stage, or a stage into a Hugging Face folder.",
}


def build_parser(verbs: Verbs, about: str) -> ArgumentParser:
    """All sub-commands and their settings."""
    from cocoa_jax.commands.command import Parser

    parser = Parser(prog="cocoa", description=about)
    _add_verbs(parser, verbs)
    return parser


def _add_verbs(parser: ArgumentParser, verbs: Verbs) -> None:
    from cocoa_jax.commands.command import Parser

    added = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, verb in verbs.items():
        if isinstance(verb, Mapping):
            group = Parser(description=GROUPS[name])
            added.add_subcommand(name, group, help=GROUPS[name])  # before its own verbs: jsonargparse goes by level
            _add_verbs(group, verb)
        else:
            added.add_subcommand(name, verb.parser(), help=verb.about)


def chosen(verbs: Verbs, parsed: Namespace) -> tuple[Command, Namespace]:
    """The command that was asked for, and what it was given."""
    verb, given = verbs[parsed.command], parsed[parsed.command]
    return chosen(verb, given) if isinstance(verb, Mapping) else (verb, given)


def _installed(arguments: Sequence[str]) -> list[str]:
    """``--config configs/...`` means the installed file where the folder holds none of that name."""
    from cocoa_jax.config import find_config

    found = list(arguments)
    for place, argument in enumerate(found):
        if argument.startswith("--config="):
            found[place] = f"--config={find_config(argument.removeprefix('--config='))}"
        elif place and found[place - 1] == "--config":
            found[place] = str(find_config(argument))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``cocoa`` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", module="jax")
    from cocoa_jax.training.loop import STOPPED, Stopped

    verbs = commands()
    parser = build_parser(verbs, "CoCoA multimodal embedding models in JAX.")
    parsed = parser.parse_args(_installed(sys.argv[1:] if arguments is None else arguments))
    command, given = chosen(verbs, parsed)
    try:
        command.run(chosen(verbs, parser.instantiate(parsed))[1] if command.config else given)
    except Stopped as stopped:
        sys.stderr.write(f"cocoa: {stopped}\n")
        raise SystemExit(STOPPED) from None
    except KeyboardInterrupt:
        sys.stderr.write("cocoa: interrupted; the same command continues from the last checkpoint\n")
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, OSError) as error:
        if given.debug:
            raise
        sys.stderr.write(f"cocoa: {error}\n")
        raise SystemExit(1) from None
