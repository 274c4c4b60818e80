"""``cocoa evaluate``, ``embed`` and ``report``: what a trained model is worth, and its embeddings."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command
from cocoa_jax.demo import STAGES
from cocoa_jax.embedder import embed_file
from cocoa_jax.evaluation.collect import build_report
from cocoa_jax.evaluation.run import evaluate, summary

CHECKPOINT_HELP = "a trained stage or a Hugging Face folder"


def _evaluate_options(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--output", required=True, help="folder of results.json")
    parser.add_argument("--splits", default="test_seen,test_unseen", help="of validation, test_seen, test_unseen")
    parser.add_argument("--untrained", default=None, help="model to compare with; default: where training began")


def _evaluate(given: Namespace) -> None:
    done = evaluate(given.checkpoint, given.output, given.splits.split(","), given.untrained)
    sys.stdout.write(summary(done.results) + "\n")


def _embed_options(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--input", required=True, help='lines like {"text": "a kiwi", "image": "kiwi.png"}')
    parser.add_argument("--output", required=True, help="npz file with embeddings [n, D], float32")


def _report_options(parser: ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="folder that holds the folders of the stages")
    parser.add_argument("--stages", default=",".join(STAGES), help="their names, in order")


def _report(given: Namespace) -> None:
    sys.stdout.write(f"report: {build_report(Path(given.run), given.stages.split(','))}\n")


EVALUATE = Command(
    about="Score a checkpoint on the picture tasks.",
    example="cocoa evaluate --checkpoint runs/demo/3-contrastive --output runs/demo/evaluation",
    options=_evaluate_options,
    run=_evaluate,
)
EMBED = Command(
    about="Embed the items of a JSON-lines file: text, image, or both.",
    example="cocoa embed --checkpoint runs/demo/3-contrastive --input items.jsonl --output out.npz",
    options=_embed_options,
    run=lambda given: embed_file(given.checkpoint, given.input, given.output),
)
REPORT = Command(
    about="Write the page of a run: scores, losses, neighbours, drawings.",
    example="cocoa report --run runs/demo",
    options=_report_options,
    run=_report,
)
