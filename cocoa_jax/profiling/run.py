"""``cocoa profile``: what its sub-commands print and write."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cocoa_jax.config import TrainConfig, to_dict
from cocoa_jax.profiling.attention import profile_attention
from cocoa_jax.profiling.cells import Cells
from cocoa_jax.profiling.report import attention_markdown, write_attention
from cocoa_jax.profiling.step_cost import check_step, step_markdown, step_spec


def attention_table(
    device: str | None,
    lengths: Sequence[int],
    masks: Sequence[str],
    implementations: Sequence[str],
    backward: bool,
    rows: int,
    heads: tuple[int, int],
    width: int,
    output: str | None,
) -> str:
    """The table of attention as Markdown; with ``output`` also as files, its cells kept below."""
    cells = Path(output, "cells") if output else None

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    found = profile_attention(device, lengths, masks, implementations, backward, rows, heads, width, cells, say)
    if output:
        write_attention(found, output)
    return attention_markdown(found)


def step_table(config: TrainConfig, topology: str, slices: int, output: str | None) -> str:
    """The table of a train step as Markdown; with ``output`` also as ``step.md`` and ``step.json``."""
    check_step(config, topology, slices)
    result = Cells(Path(output, "cells") if output else None).get(step_spec(to_dict(config), topology, slices))
    text = step_markdown(result)
    if output:
        Path(output, "step.md").write_text(text)
        Path(output, "step.json").write_text(json.dumps(result, indent=1) + "\n")
    return text
