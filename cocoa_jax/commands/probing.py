"""``cocoa probe``: whether the bridge token holds the content."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command
from cocoa_jax.evaluation.probe import PLOT, RESULTS, probe, summary


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoints", required=True, help="stages in order, by commas, after what they began with")
    parser.add_argument("--names", default=None, help="what to call them, by commas; else the names of their folders")
    parser.add_argument("--output", required=True, help=f"folder of {RESULTS} and {PLOT}")
    parser.add_argument("--split", default="test_unseen", help="of the embedded pictures")
    parser.add_argument("--examples", type=int, default=256, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the words that are asked for, and of the shuffling")


def _probe(given: Namespace) -> None:
    names = None if given.names is None else given.names.split(",")
    results = probe(given.checkpoints.split(","), given.output, given.split, given.examples, given.seed, names)
    sys.stdout.write(f"{summary(results)}\n\nplot: {given.output}/{PLOT}\n")


PROBE = Command(
    about="Rebuild words from the bridge token alone, and look at attention and embeddings stage by stage.",
    example="cocoa probe --checkpoints runs/demo/backbone,runs/demo/2-bridge --output runs/demo/probe",
    options=_options,
    run=_probe,
    local=("output",),
)
