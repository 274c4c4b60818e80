"""Which instructions queries were read with, and whether a model was trained with the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa_jax.checkpoints.places import folder_at
from cocoa_jax.data.readers.mmeb import QUERY_INSTRUCTIONS, evaluated_name
from cocoa_jax.data.readers.ranked import RankedSet

MIXTURE = "mixture.json"  # what a stage was trained on, in its folder


def trained_prompts(checkpoint: str | Path) -> dict[str, str]:
    """By set, the instruction of its queries in training; without those that the stage's mixture does not tell."""
    try:
        mixture = json.loads((folder_at(checkpoint) / MIXTURE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for name, dataset in mixture.get("datasets", {}).items():  # the embedded pictures are none
        settings = dataset["settings"]
        known = evaluated_name(settings["subset"] or name)
        published = settings["format"] == "mmeb-train" and settings["split"] in ("", "original")
        if settings["instruction"]:
            found[known] = settings["instruction"]
        elif published and known in QUERY_INSTRUCTIONS:
            found[known] = QUERY_INSTRUCTIONS[known]
    return found


def compared(sets: Mapping[str, RankedSet], trained: Mapping[str, str]) -> dict[str, Any]:
    """Whose instructions the sets have, and which of them training had too.

    Returns:
        ``whose``, and names of sets: ``as_trained``, ``otherwise`` with both instructions, ``unknown`` where training
        says nothing.
    """
    seen = [name for name in sets if name in trained]
    return {
        "whose": sorted({one.prompts for one in sets.values()}),
        "as_trained": [name for name in seen if sets[name].instruction == trained[name]],
        "otherwise": {
            name: [sets[name].instruction, trained[name]] for name in seen if sets[name].instruction != trained[name]
        },
        "unknown": [name for name in sets if name not in trained],
    }


def prompts_said(prompts: Mapping[str, Any]) -> str:
    """What a reader must know about them, in one sentence."""
    others = "".join(f" ({name}: {own!r}, trained {was!r})" for name, (own, was) in prompts["otherwise"].items())
    return (
        f"instructions of {', '.join(prompts['whose'])}: those of training in {len(prompts['as_trained'])} sets, "
        f"others in {len(prompts['otherwise'])}{others}; training tells none for {len(prompts['unknown'])}."
    )
