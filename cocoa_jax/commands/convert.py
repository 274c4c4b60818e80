"""``cocoa convert hf-to-orbax`` and ``orbax-to-hf``: weights between the two forms that they have on disk."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from cocoa_jax.checkpoints.convert import byte_count, hf_to_orbax, orbax_to_hf
from cocoa_jax.commands.command import Command


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="folder to read")
    parser.add_argument("destination", help="folder to make; must not exist, or be empty")


def _hub_options(parser: ArgumentParser) -> None:
    _options(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as it is stored")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file, such as 500MB or 5GB")


TO_ORBAX = Command(
    about="Make a folder like a trained stage's out of a Hugging Face folder.",
    example="cocoa convert hf-to-orbax runs/backbone runs/stage",
    options=_options,
    run=lambda given: hf_to_orbax(given.source, given.destination),
)
TO_HF = Command(
    about="Make a Hugging Face folder out of a stage's newest checkpoint.",
    example="cocoa convert orbax-to-hf runs/demo/3-contrastive runs/hub --dtype bfloat16",
    options=_hub_options,
    run=lambda given: orbax_to_hf(given.source, given.destination, given.dtype, byte_count(given.max_shard_size)),
)
