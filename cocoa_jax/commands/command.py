"""What a sub-command is made of."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from cocoa_jax.checkpoints.places import is_remote
from cocoa_jax.config import SettingsError

CONFIG_HELP = "YAML file of settings, in this folder or installed; a setting on the command line comes before it"


class Parser(ArgumentParser):
    """One clear line for bad usage instead of a page of it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if ex is not None and "--debug" in sys.argv:
            raise ex
        lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
        sys.stderr.write(f"cocoa: {'; '.join(lines)} (see {self.prog} --help)\n")
        raise SystemExit(2)


@dataclasses.dataclass(frozen=True)
class Command:
    """A verb of the command line.

    Args:
        about: one sentence for its help.
        example: a whole command line.
        options: adds what it takes to its parser.
        run: does it; gets the parsed values, with settings as the objects they describe.
        config: whether settings may come from a YAML file.
        local: which of its options take paths of this machine and none in a bucket.
    """

    about: str
    example: str
    options: Callable[[ArgumentParser], object]
    run: Callable[[Namespace], object]
    config: bool = False
    local: tuple[str, ...] = ()

    def require_local(self, given: Namespace) -> None:
        """See that what must lie on this machine does not name a bucket, which would become a folder ``gs:`` here.

        Raises:
            SettingsError: naming the option.
        """
        for name in self.local:
            if is_remote(given[name] or ""):
                raise SettingsError(
                    f"{name} is {given[name]}: give a path of this machine, and copy from or to the bucket yourself"
                )

    def parser(self) -> ArgumentParser:
        """Its own parser."""
        made = Parser(description=self.about, epilog=f"example: {self.example}")
        made.add_argument("--debug", action="store_true", help="show where an error came from")
        if self.config:
            made.add_argument("--config", action=ActionConfigFile, help=CONFIG_HELP)
        self.options(made)
        return made


@dataclasses.dataclass(frozen=True)
class Group:
    """Verbs under one word, such as ``cocoa convert``.

    Args:
        about: one sentence for its help.
        verbs: each by its name.
    """

    about: str
    verbs: Mapping[str, Command]

    def parser(self) -> ArgumentParser:
        """The parser of its word, without its verbs."""
        return Parser(description=self.about)


def fields(given: Namespace) -> dict[str, Any]:
    """The settings among the parsed values, by name."""
    return {name: value for name, value in vars(given).items() if name not in ("config", "debug")}
