"""``cocoa profile attention``, ``step``, ``trace``, ``masks``: what a program costs, here or on a TPU slice."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cocoa_jax.commands.command import Command, Group
from cocoa_jax.config import TrainConfig
from cocoa_jax.profiling.attention import ProfileError
from cocoa_jax.profiling.attention_model import IMPLEMENTATIONS
from cocoa_jax.profiling.masks import MASKS
from cocoa_jax.profiling.picture import draw_masks
from cocoa_jax.profiling.run import attention_table, step_table
from cocoa_jax.profiling.trace import record_trace


def _attention_options(parser: ArgumentParser) -> None:
    parser.add_argument("--topology", default=None, help="slice to compile for, such as v5e:1x1: a static model")
    parser.add_argument("--device", action="store_true", help="measure on the device that is here instead")
    parser.add_argument("--lengths", default="1024,2048,4096", help="tokens in a row")
    parser.add_argument("--masks", default="full,causal,bridge,packed-bridge", help=f"of {', '.join(MASKS)}")
    names = f"of {', '.join(IMPLEMENTATIONS)}"
    parser.add_argument("--implementations", default="reference,splash,flash_tpu", help=names)
    parser.add_argument("--backward", action="store_true", help="forward and backward, not forward alone")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch")
    parser.add_argument("--heads", default="12,2", help="query heads and key/value heads")
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--output", default=None, help="folder of tables and drawing; what it holds is not done again")


def _attention(given: Namespace) -> None:
    if given.device == (given.topology is not None):
        raise ProfileError("profile attention: give either --topology, such as v5e:1x1, or --device")
    if not all(length.isdigit() for length in given.lengths.split(",")):
        raise ProfileError(f"--lengths is {given.lengths!r}: give numbers, such as 1024,4096")
    lengths = [int(length) for length in given.lengths.split(",")]
    heads = given.heads.split(",")
    if len(heads) != 2 or not all(number.isdigit() for number in heads):
        raise ProfileError(f"--heads is {given.heads!r}: give query heads and key heads, such as 12,2")
    names = given.masks.split(","), given.implementations.split(",")
    count, width = (int(heads[0]), int(heads[1])), given.width
    table = attention_table(given.topology, lengths, *names, given.backward, given.rows, count, width, given.output)
    sys.stdout.write(table)


def _step_options(parser: ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, help="slice to compile for, such as v5e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="how many of them, joined by the data-centre network")
    parser.add_argument("--report", default=None, help="folder of step.md and step.json")
    parser.add_class_arguments(TrainConfig)


def _trace_options(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3, help="how many to record, after two that compile and settle")
    parser.add_argument("--trace", default="runs/trace", help="folder for TensorBoard or xprof")
    parser.add_class_arguments(TrainConfig)


def _config(given: Namespace) -> TrainConfig:
    values: dict[str, Any] = vars(given)
    return TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})


def _step(given: Namespace) -> None:
    sys.stdout.write(step_table(_config(given), given.topology, given.slices, given.report))


def _trace(given: Namespace) -> None:
    sys.stdout.write(f"trace: {record_trace(_config(given), given.steps, given.trace)}\n")


def _masks_options(parser: ArgumentParser) -> None:
    parser.add_argument("--masks", default="full,causal,bridge,packed-bridge", help=f"of {', '.join(MASKS)}")
    parser.add_argument("--length", type=int, default=4096, help="tokens in the row")
    parser.add_argument("--block", type=int, default=512, help="side of a tile")
    parser.add_argument("--output", required=True, help="SVG or PNG file to write")


def _masks(given: Namespace) -> None:
    sys.stdout.write(f"drawn: {draw_masks(given.masks.split(','), given.length, given.block, given.output)}\n")


_ATTENTION = Command(
    about="Attention by mask, length and implementation.",
    example="cocoa profile attention --topology v5e:1x1 --lengths 1024,4096 --masks full,packed-bridge --backward",
    options=_attention_options,
    run=_attention,
    local=("output",),
)
_STEP = Command(
    about="The whole train step of a stage, compiled for a TPU slice.",
    example="cocoa profile step --config configs/profile/2b-bridge.yaml --topology v5e:4x4",
    options=_step_options,
    run=_step,
    config=True,
    local=("report",),
)
_TRACE = Command(
    about="An XLA trace of real steps on the device that is here.",
    example="cocoa profile trace --config configs/demo/2-bridge.yaml --checkpoint=runs/demo/1-warmup --steps 3",
    options=_trace_options,
    run=_trace,
    config=True,
    local=("trace",),
)
_MASKS = Command(
    about="Draw masks and the tiles that a span kernel visits under them.",
    example="cocoa profile masks --masks bridge,packed-bridge --output masks.png",
    options=_masks_options,
    run=_masks,
    local=("output",),
)
GROUP = Group(
    "What attention or a train step costs on a TPU slice that need not be there, or here.",
    {"attention": _ATTENTION, "step": _STEP, "trace": _TRACE, "masks": _MASKS},
)
