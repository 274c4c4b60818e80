"""``cocoa plan``: whether a train step fits a TPU slice that need not be there, and what it costs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command
from cocoa_jax.config import TrainConfig
from cocoa_jax.profiling.cells import Cells
from cocoa_jax.profiling.plan_run import plan, search


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, help="slice to compile for, such as v5e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="how many of them, joined by the data-centre network")
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and chunks; rank what fits")
    parser.add_argument("--limit", type=int, default=12, help="how many settings a search compiles at most")
    parser.add_argument("--cells", default=None, help="folder of what was compiled; what it holds is not done again")
    parser.add_class_arguments(TrainConfig)


def _plan(given: Namespace) -> None:
    values: dict[str, Any] = vars(given)
    config = TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})
    cells = Cells(Path(given.cells) if given.cells else None)

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    if given.search:
        sys.stdout.write(search(config, given.topology, given.slices, given.limit, cells, say))
    else:
        plan(config, given.topology, given.slices, cells, say, sys.stdout.write)


PLAN = Command(
    about="Compile the true train step of a stage for a TPU slice: does it fit, what does it cost, what bounds it.",
    example="cocoa plan --config configs/pods/1-warmup-lora.yaml --topology v5e:4x4",
    options=_options,
    run=_plan,
    config=True,
    local=("cells",),
)
