"""``cocoa convert``: a Hugging Face folder into a stage, and a stage into a Hugging Face folder."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.checkpoints.convert import byte_count, hf_to_orbax, orbax_to_hf
from cocoa_jax.commands.command import Command, Group


def _folders(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder to read")
    parser.add_argument("destination", metavar="DST", help="folder to make; must not exist, or be empty")


def _hf_options(parser: ArgumentParser) -> None:
    _folders(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as it is stored")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file, such as 500MB or 5GB")


def _to_hf(given: Namespace) -> None:
    limit, progress = byte_count(given.max_shard_size), sys.stderr.isatty()
    orbax_to_hf(given.source, given.destination, given.dtype, limit, progress=progress)


_TO_ORBAX = Command(
    about="Make a folder like a trained stage's out of a Hugging Face folder.",
    example="cocoa convert hf-to-orbax Qwen2-VL-2B-Instruct runs/start",
    options=_folders,
    run=lambda given: hf_to_orbax(given.source, given.destination, progress=sys.stderr.isatty()),
    local=("destination",),
)
_TO_HF = Command(
    about="Make a Hugging Face folder out of a stage's newest checkpoint.",
    example="cocoa convert orbax-to-hf runs/demo/3-contrastive runs/hub --dtype bfloat16",
    options=_hf_options,
    run=_to_hf,
    local=("destination",),
)
GROUP = Group(
    "Turn a Hugging Face folder into a stage, or a stage into a Hugging Face folder.",
    {"hf-to-orbax": _TO_ORBAX, "orbax-to-hf": _TO_HF},
)
