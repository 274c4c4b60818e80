"""``cocoa study``: many short runs that answer questions about the method, and their report."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command, Group
from cocoa_jax.study.design import load_study
from cocoa_jax.study.report import write_report
from cocoa_jax.study.run import listing, run_study

SCALES = {"full": "pictures", "small": "pictures-small", "large": "pictures-large"}


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/study", help="folder of everything; several processes may share it")
    scale = "small: a few steps, to try the study; large: larger models and batches, for a GPU"
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help=scale)
    parser.add_argument("--only", default="", help="names of questions, by commas")
    parser.add_argument("--seeds", type=int, default=None, help="at most so many seeds of a question")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints that no piece of the study needs")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and train nothing")


def _study(given: Namespace) -> None:
    study, only = load_study(SCALES[given.scale]), tuple(name for name in given.only.split(",") if name)
    if given.list:
        sys.stdout.write(listing(study, given.output, only, given.seeds))
        return
    run_study(study, given.output, only, given.keep, _tell, given.seeds)
    sys.stdout.write(f"report: {write_report(study, Path(given.output), Path(given.output) / 'report')}\n")


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()  # a study goes on for hours: whoever follows its log must not wait for a full buffer


def _report_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="output of `cocoa study pictures`, or a folder of its pieces")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="which study it is")
    parser.add_argument("--docs", default="docs", help="folder of results.md, and of study/ with plots and pieces")


def _report(given: Namespace) -> None:
    page = write_report(load_study(SCALES[given.scale]), Path(given.run), Path(given.docs))
    sys.stdout.write(f"report: {page}\n")


PICTURES = Command(
    about="Compare recipes and fields on the embedded pictures over seeds; what is done is not done again.",
    example="cocoa study pictures --output runs/study --only recipes-steps,recipes-compute",
    options=_options,
    run=_study,
    local=("output",),
)
REPORT = Command(
    about="Write tables and plots of the pieces that are there.",
    example="cocoa study report runs/study --docs docs",
    options=_report_options,
    run=_report,
    local=("run", "docs"),
)
GROUP = Group(
    about="Many short runs that answer questions about the method.", verbs={"pictures": PICTURES, "report": REPORT}
)
