"""``cocoa adapter export`` and ``merge``: an adapter as PEFT has it, or inside of its weights."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from cocoa_jax.checkpoints.merging import merge_checkpoint
from cocoa_jax.checkpoints.peft import export_adapter
from cocoa_jax.commands.command import Command, Group


def _export_options(parser: ArgumentParser) -> None:
    parser.add_argument("stage", help="a stage that was trained with --lora")
    parser.add_argument("destination", help="folder to make")


def _merge_options(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a trained stage or a Hugging Face folder")
    parser.add_argument("destination", help="folder to make")
    parser.add_argument("--adapter", default=None, help="a PEFT folder to merge; a stage's own is merged anyway")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the tensors")


_EXPORT = Command(
    about="Write what a stage trained instead of its backbone as a PEFT adapter.",
    example="cocoa adapter export runs/lora/3-contrastive runs/peft",
    options=_export_options,
    run=lambda given: export_adapter(given.stage, given.destination),
    local=("destination",),
)
_MERGE = Command(
    about="Write weights with their adapter merged as a Hugging Face folder.",
    example="cocoa adapter merge runs/lora/3-contrastive runs/merged --dtype bfloat16",
    options=_merge_options,
    run=lambda given: merge_checkpoint(given.checkpoint, given.destination, given.adapter, given.dtype),
    local=("destination", "adapter"),
)
GROUP = Group(
    "Write a LoRA or DoRA adapter as PEFT does, or merged into its weights.", {"export": _EXPORT, "merge": _MERGE}
)
