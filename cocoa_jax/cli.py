"""The ``cocoa`` command: one thin sub-command per verb, no logic."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from cocoa_jax.commands.command import Command, Group


def commands() -> dict[str, Command | Group]:
    """Every sub-command by name."""
    # They pull in JAX; they are imported when somebody calls, not when somebody imports this module.
    from cocoa_jax.commands import adapter, conversion, data, planning, probing, profiling, reading, studying, training

    return {
        "demo": training.DEMO,
        "run": training.RUN,
        "init": training.INIT,
        "train": training.TRAIN,
        "evaluate": reading.EVALUATE,
        "embed": reading.EMBED,
        "report": reading.REPORT,
        "probe": probing.PROBE,
        "adapter": adapter.GROUP,
        "convert": conversion.GROUP,
        "data": data.GROUP,
        "profile": profiling.GROUP,
        "plan": planning.PLAN,
        "study": studying.GROUP,
    }


def build_parser(verbs: Mapping[str, Command | Group], about: str) -> ArgumentParser:
    """All sub-commands and their settings."""
    from cocoa_jax.commands.command import Parser

    parser = Parser(prog="cocoa", description=about)
    _add_verbs(parser, verbs)
    return parser


def _add_verbs(parser: ArgumentParser, verbs: Mapping[str, Command | Group]) -> None:
    from cocoa_jax.commands.command import Group

    added = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, verb in verbs.items():
        own = verb.parser()
        added.add_subcommand(name, own, help=verb.about)  # before its own verbs: jsonargparse goes by level
        if isinstance(verb, Group):
            _add_verbs(own, verb.verbs)


def chosen(verbs: Mapping[str, Command | Group], parsed: Namespace) -> tuple[Command, Namespace]:
    """The command that was asked for, and what it was given."""
    from cocoa_jax.commands.command import Group

    verb, given = verbs[parsed.command], parsed[parsed.command]
    return chosen(verb.verbs, given) if isinstance(verb, Group) else (verb, given)


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
    from cocoa_jax.training.hosts import again, leave
    from cocoa_jax.training.loop import STOPPED, Stopped

    # Threads that save log what goes wrong, at length; the main one then raises it. absl sets its level anew by itself.
    logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.CRITICAL)

    verbs = commands()
    parser = build_parser(verbs, "CoCoA multimodal embedding models in JAX.")
    parsed = parser.parse_args(_installed(sys.argv[1:] if arguments is None else arguments))
    command, given = chosen(verbs, parsed)
    try:
        command.require_local(given)
        command.run(chosen(verbs, parser.instantiate(parsed))[1] if command.config else given)
        return
    except Stopped as stopped:  # all processes of the run come to their end together, see ended_together
        sys.stderr.write(f"cocoa: {stopped}\n")
        raise SystemExit(STOPPED) from None
    except KeyboardInterrupt:
        status, said = 130, "interrupted; the same command continues from the last checkpoint"
    except Exception as error:
        status, said = STOPPED if again(error) else 1, str(error) or repr(error)
        if status == 1 and (given.debug or not isinstance(error, ValueError | RuntimeError | OSError)):
            leave(status, traceback.format_exc())
            raise
    sys.stderr.write(f"cocoa: {said}\n")
    leave(status)
    raise SystemExit(status)
