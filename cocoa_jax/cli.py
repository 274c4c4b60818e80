"""The ``cocoa`` command: one thin sub-command per verb, no logic."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from cocoa_jax import data_cli

EXAMPLES = {
    "demo": "cocoa demo --output runs/demo --scale standard",
    "init": "cocoa init --config configs/demo/backbone.yaml --output runs/backbone",
    "train": "cocoa train --config configs/demo/1-warmup.yaml --checkpoint=runs/backbone --loop.steps=200",
    "evaluate": "cocoa evaluate --checkpoint runs/demo/3-contrastive --output runs/demo/evaluation",
    "embed": "cocoa embed --checkpoint runs/demo/3-contrastive --input items.jsonl --output out.npz",
    "data": data_cli.EXAMPLES["inspect"],
}
CONFIG_HELP = "YAML file of settings, in this folder or installed; a setting on the command line comes before it"


class Parser(ArgumentParser):
    """One clear line for bad usage instead of a page of it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if ex is not None and "--debug" in sys.argv:
            raise ex
        lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
        sys.stderr.write(f"cocoa: {'; '.join(lines)} (see {self.prog} --help)\n")
        raise SystemExit(2)


def build_parser() -> ArgumentParser:
    """All sub-commands and their settings."""
    # Settings pull in JAX; they are imported when somebody calls, not when somebody imports this module.
    from cocoa_jax.config import InitConfig, TrainConfig

    parser = Parser(prog="cocoa", description="CoCoA multimodal embedding models in JAX.")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")

    demo = _command("demo", "Make a small Qwen2-VL and run all three stages on the embedded pictures, with a report.")
    demo.add_argument("--output", default="runs/demo", help="folder of everything that the run makes")
    demo.add_argument("--scale", choices=("small", "standard"), default="standard", help="number of steps of a stage")
    demo.add_argument("--seed", type=int, default=0, help="added to the seeds of the backbone and the stages")
    commands.add_subcommand("demo", demo, help=demo.description)

    init = _command("init", "Make a small backbone in Hugging Face form from scratch.", config=True)
    init.add_argument("--output", required=True, help="folder to make")
    init.add_class_arguments(InitConfig)
    commands.add_subcommand("init", init, help=init.description)

    train = _command("train", "Train one stage, or continue it where it was.", config=True)
    train.add_class_arguments(TrainConfig)
    commands.add_subcommand("train", train, help=train.description)

    evaluate = _command("evaluate", "Score a checkpoint on the picture tasks.")
    evaluate.add_argument("--checkpoint", required=True, help="a trained stage or a Hugging Face folder")
    evaluate.add_argument("--output", required=True, help="folder of results.json")
    evaluate.add_argument("--splits", default="test_seen,test_unseen", help="of validation, test_seen, test_unseen")
    evaluate.add_argument("--untrained", default=None, help="model to compare with; default: where training began")
    commands.add_subcommand("evaluate", evaluate, help=evaluate.description)

    embed = _command("embed", "Embed the items of a JSON-lines file: text, image, or both.")
    embed.add_argument("--checkpoint", required=True, help="a trained stage or a Hugging Face folder")
    embed.add_argument("--input", required=True, help='lines like {"text": "a kiwi", "image": "kiwi.png"}')
    embed.add_argument("--output", required=True, help="npz file with embeddings [n, D], float32")
    commands.add_subcommand("embed", embed, help=embed.description)

    data = _command("data", "Look at training data and check it.")
    commands.add_subcommand("data", data, help=data.description)
    data_cli.add_commands(data, _parser)
    return parser


def _command(name: str, description: str, config: bool = False) -> ArgumentParser:
    return _parser(EXAMPLES[name], description, config)


def _parser(example: str, description: str, config: bool) -> ArgumentParser:
    parser = Parser(description=description, epilog=f"example: {example}")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    if config:
        parser.add_argument("--config", action=ActionConfigFile, help=CONFIG_HELP)
    return parser


def run(arguments: Namespace, parser: ArgumentParser) -> None:
    """Carry out one parsed command."""
    chosen = arguments[arguments.command]
    if arguments.command == "demo":
        from cocoa_jax.demo import run_demo
        from cocoa_jax.evaluation.run import read_results, summary

        report = run_demo(chosen.output, chosen.scale, chosen.seed)
        sys.stdout.write(f"{summary(read_results(chosen.output))}\n\nreport: {report}\n")
    elif arguments.command == "init":
        from cocoa_jax.demo import make_picture_backbone

        made = parser.instantiate(arguments).init
        make_picture_backbone(made.output, made.backbone)
    elif arguments.command == "train":
        from cocoa_jax.config import TrainConfig
        from cocoa_jax.training.loop import train

        made = parser.instantiate(arguments).train
        train(TrainConfig(**_fields(made)))
    elif arguments.command == "evaluate":
        from cocoa_jax.evaluation.run import evaluate, summary

        splits = chosen.splits.split(",")
        done = evaluate(chosen.checkpoint, chosen.output, splits, chosen.untrained)
        sys.stdout.write(summary(done.results) + "\n")
    elif arguments.command == "embed":
        from cocoa_jax.embedder import embed_file

        embed_file(chosen.checkpoint, chosen.input, chosen.output)
    elif arguments.command == "data":
        data_cli.run(chosen, lambda: parser.instantiate(arguments).data)


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


def _fields(made: Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(made).items() if name not in ("config", "debug")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``cocoa`` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", module="jax")
    from cocoa_jax.training.loop import STOPPED, Stopped

    parser = build_parser()
    parsed = parser.parse_args(_installed(sys.argv[1:] if arguments is None else arguments))
    try:
        run(parsed, parser)
    except Stopped as stopped:
        sys.stderr.write(f"cocoa: {stopped}\n")
        raise SystemExit(STOPPED) from None
    except KeyboardInterrupt:
        sys.stderr.write("cocoa: interrupted; the same command continues from the last checkpoint\n")
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, OSError) as error:
        if parsed[parsed.command].debug:
            raise
        sys.stderr.write(f"cocoa: {error}\n")
        raise SystemExit(1) from None
