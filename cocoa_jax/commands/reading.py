"""``cocoa evaluate``, ``embed`` and ``report``: what a trained model is worth, and its embeddings."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command
from cocoa_jax.config import DistributedConfig, EvaluateConfig, SettingsError, load_config
from cocoa_jax.demo import STAGES
from cocoa_jax.embedder import embed_file
from cocoa_jax.evaluation.collect import REPORT as PAGE
from cocoa_jax.evaluation.collect import build_report
from cocoa_jax.evaluation.run import evaluate, summary
from cocoa_jax.evaluation.set_page import read_runs, write_set_report
from cocoa_jax.evaluation.set_tables import markdown
from cocoa_jax.evaluation.sets import MMEB, evaluate_sets, named_sets
from cocoa_jax.training.hosts import is_first, join

PICTURES = "pictures"
SPLITS = "test_seen,test_unseen"
CHECKPOINT_HELP = "a trained stage or a Hugging Face folder"
SETTINGS_HELP = "YAML of how to read pixels and text; default: as in training"


def _evaluate_options(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--output", required=True, help="folder of results.json")
    parser.add_argument("--tasks", default=PICTURES, help=f"{PICTURES} (the embedded ones), {MMEB}, or a YAML of sets")
    parser.add_argument("--data", default=None, help="folder of MMEB-eval, or where the paths of the YAML begin")
    parser.add_argument("--sets", default="", help="only these of the tasks, by commas")
    parser.add_argument("--settings", default=None, help=SETTINGS_HELP)
    parser.add_argument("--splits", default=None, help=f"of validation, test_seen, test_unseen; default: {SPLITS}")
    parser.add_argument("--untrained", default=None, help="model to compare with; default: where training began")
    parser.add_class_arguments(DistributedConfig, "distributed", help="the processes of one evaluation, one a host")


def _evaluate(given: Namespace) -> None:
    join(DistributedConfig(**vars(given.distributed)))
    settings = _settings(given)
    if given.tasks == PICTURES:
        if given.sets or given.data:
            raise SettingsError("--sets and --data are not for the embedded pictures: name other tasks by --tasks")
        done = evaluate(given.checkpoint, given.output, (given.splits or SPLITS).split(","), given.untrained, settings)
        if is_first():
            sys.stdout.write(summary(done.results) + "\n")
        return
    if given.splits is not None or given.untrained is not None:
        raise SettingsError("--splits and --untrained are for the embedded pictures alone: leave them out")
    sets = named_sets(given.tasks, given.data, [name for name in given.sets.split(",") if name])
    results = evaluate_sets(given.checkpoint, given.output, sets, settings)
    if is_first():
        page = write_set_report(Path(given.output) / PAGE, {str(given.checkpoint): results})
        sys.stdout.write(f"{markdown({str(given.checkpoint): results})}\nreport: {page}\n")


def _settings(given: Namespace) -> EvaluateConfig | None:
    return load_config(EvaluateConfig, given.settings) if given.settings else None


def _embed_options(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--input", required=True, help='lines like {"text": "a kiwi", "image": "kiwi.png"}')
    parser.add_argument("--output", required=True, help="npz file with embeddings [n, D], float32")
    parser.add_argument("--settings", default=None, help=SETTINGS_HELP)


def _report_options(parser: ArgumentParser) -> None:
    parser.add_argument("--run", default=None, help="folder that holds the folders of the stages")
    parser.add_argument("--stages", default=",".join(STAGES), help="their names, in order")
    parser.add_argument("--evaluations", default=None, help="in place of a run: outputs of evaluate --tasks, by commas")
    parser.add_argument("--output", default=PAGE, help="with evaluations: the page to write")


def _report(given: Namespace) -> None:
    if (given.run is None) == (given.evaluations is None):
        raise SettingsError("report: give either --run or --evaluations")
    if given.run is not None:
        page = build_report(Path(given.run), given.stages.split(","))
    else:
        page = write_set_report(Path(given.output), read_runs(given.evaluations.split(",")))
    sys.stdout.write(f"report: {page}\n")


EVALUATE = Command(
    about="Score a checkpoint on the picture tasks, on MMEB-V1 or on sets of your own.",
    example="cocoa evaluate --checkpoint runs/demo/3-contrastive --output runs/demo/evaluation",
    options=_evaluate_options,
    run=_evaluate,
    local=("output", "tasks", "data", "settings"),
)
EMBED = Command(
    about="Embed the items of a JSON-lines file: text, image, or both.",
    example="cocoa embed --checkpoint runs/demo/3-contrastive --input items.jsonl --output out.npz",
    options=_embed_options,
    run=lambda given: embed_file(given.checkpoint, given.input, given.output, _settings(given)),
    local=("input", "output", "settings"),
)
REPORT = Command(
    about="Write the page of a run: scores, losses, neighbours, drawings; or of evaluations side by side.",
    example="cocoa report --run runs/demo",
    options=_report_options,
    run=_report,
    local=("run", "evaluations", "output"),
)
