"""Does the bridge token hold the content? What can be rebuilt from it, what attention it gets, how embeddings lie."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cocoa_jax.checkpoints.added_tokens import with_mean_rows
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.orbax import read_metadata
from cocoa_jax.checkpoints.places import folder_at, is_folder
from cocoa_jax.config import EvaluateConfig, to_dict
from cocoa_jax.data.masking import Purpose, example_rng
from cocoa_jax.data.pairs import picture_source
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.prompts import instruct, plain
from cocoa_jax.data.sources import Content, Record, load_pictures
from cocoa_jax.embedder import Embedder, default_settings
from cocoa_jax.evaluation.geometry import alignment, effective_rank, uniformity
from cocoa_jax.evaluation.probe_plot import draw_probe
from cocoa_jax.evaluation.rebuilding import Rebuilt, looker, partners, rebuild
from cocoa_jax.evaluation.sets import code_version
from cocoa_jax.evaluation.statistics import interval, resampled

RESULTS, PLOT = "probe.json", "probe.svg"


def probe(
    checkpoints: Sequence[str | Path],
    output: str | Path,
    split: str = "test_unseen",
    examples: int = 256,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Probes models on the embedded pictures, all in the same way, and writes ``probe.json`` and ``probe.svg``.

    Args:
        checkpoints: the stages of a run in order, and the folder that it began with; pixels, rows, visibility and
            bridge tokens are those of the last, and tokens that a model lacks are there as training would begin them.
        split: of the embedded pictures.
        examples: how many pictures, taken evenly.
        names: what to call the checkpoints; None takes the names of their folders.

    Raises:
        ValueError: fewer than two examples, a folder that holds no model, or names that are not one for each.
    """
    named, found = _named(checkpoints, names), dict[str, Any]()
    if examples < 2:
        raise ValueError(f"examples is {examples}: what is compared with others needs two at least")
    settings = default_settings(checkpoints[-1])
    pictures = load_pictures(split)
    kept = [
        (2 * i + 1) * len(pictures) // (2 * min(examples, len(pictures))) for i in range(min(examples, len(pictures)))
    ]
    shown = [pictures[i] for i in kept]
    source = picture_source("bridge", shown)
    records = [source.record(i, example_rng(seed, 0, i, Purpose.RECORD)) for i in range(len(shown))]
    sides = [Content(instruct("picture"), (p.image,)) for p in shown], [Content(plain(p.caption)) for p in shown]
    # Each is rebuilt twice, from its own bridge and from another's, and both of its sides are embedded.
    with tqdm(total=4 * len(shown) * len(named), unit="item", dynamic_ncols=True) as bar:
        for name, folder in named.items():
            bar.set_description(name)
            rebuilt = _rebuilding(folder, settings, records, seed, bar.update)
            found[name] = {**rebuilt, "embeddings": _geometry(folder, settings, sides, bar.update)}
    results = {
        "stages": found,
        "config": {"split": split, "examples": len(shown), "seed": seed, "code": code_version(), **to_dict(settings)},
    }
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{RESULTS}.partial"
    aside.write_text(json.dumps(results, indent=1))
    os.replace(aside, folder / RESULTS)
    draw_probe(results, folder / PLOT)
    return results


def summary(results: Mapping[str, Any]) -> str:
    """The figures as a table of text, one line a checkpoint."""
    heads = "bits through the bridge", "accuracy", "shuffled", "rank", "uniformity"
    head = f"{'checkpoint':20} {heads[0]:>32} {heads[1]:>9} {heads[2]:>9} {heads[3]:>7} {heads[4]:>10}"
    lines = [head]
    for name, found in results["stages"].items():
        low, high = found["bits_of_an_example_interval"]
        lines.append(
            f"{name:20} {found['bits_of_an_example']:15.2f} [{low:6.2f}, {high:6.2f}] {100 * found['accuracy']:8.1f}% "
            f"{100 * found['shuffled_accuracy']:8.1f}% {found['embeddings']['effective_rank']:7.1f} "
            f"{found['embeddings']['uniformity']:10.2f}"
        )
    return "\n".join(lines)


def _named(checkpoints: Sequence[str | Path], names: Sequence[str] | None) -> dict[str, Path]:
    paths = [folder_at(folder) for folder in checkpoints]
    if names is not None:
        if len(names) != len(paths) or len(set(names)) < len(names) or "" in names:
            raise ValueError(f"names are {list(names)} for {len(paths)} checkpoints: give each one of its own")
        return dict(zip(names, paths, strict=True))
    return {path.name if [p.name for p in paths].count(path.name) == 1 else str(path): path for path in paths}


def _rebuilding(
    folder: Path, settings: EvaluateConfig, records: Sequence[Record], seed: int, tick: Callable[[int], object]
) -> dict[str, Any]:
    backbone = open_backbone(folder)
    processor = Processor.load(backbone.side_files, backbone.config, settings.processor)
    params = with_mean_rows(backbone.load(), processor.added.values(), processor.used_rows)
    look, shift = looker(backbone.config, settings.compute), is_shifted(folder)
    own, other = (
        rebuild(records, others, processor, params, settings.rows, settings.visibility, look, shift, tick)
        for others in (range(len(records)), partners(records, seed))
    )
    return {"weights": backbone.fingerprint(), "shifted": shift, **compared(own, other, len(records))}


def is_shifted(folder: str | Path) -> bool:
    """Whether words are predicted from the state before them, as the last stage that hid words was trained to do.

    So it is, as in the paper, where no stage did, or where the stage before is not there any more.
    """
    path = folder_at(folder)
    while is_folder(path) and open_backbone(path).trained:
        metadata = read_metadata(path)
        masking = metadata["config"] and metadata["config"]["data"]["masking"]
        if masking:
            return bool(masking["shift"])
        if metadata["parent"] is None:
            break
        path = folder_at(metadata["parent"]["path"])
    return True


def compared(own: Rebuilt, other: Rebuilt, examples: int) -> dict[str, Any]:
    """What the true bridge tells beyond that of another example; bits are log2 of how much likelier the words get.

    The bridge of another example misleads, which one of no example would not: the bits are no less than those of a
    comparison with what is known beforehand.
    """
    gain = _per_example(other, examples) - _per_example(own, examples)
    low, high = interval(resampled(gain))
    return {
        "accuracy": float(own.right.mean()),
        "shuffled_accuracy": float(other.right.mean()),
        "first_accuracy": float(own.right[own.first].mean()),
        "shuffled_first_accuracy": float(other.right[other.first].mean()),
        "bits_of_a_token": float(own.bits.mean()),
        "shuffled_bits_of_a_token": float(other.bits.mean()),
        "bits_of_an_example": float(gain.mean()),
        "bits_of_an_example_interval": [low, high],
        "tokens": len(own.bits),
        "attention": {
            "words_to_bridge": own.mass[:, 2, 1].tolist(),
            "words_to_words": own.mass[:, 2, 2].tolist(),
            "bridge_to_block_a": own.mass[:, 1, 0].tolist(),
            "bridge_to_bridge": own.mass[:, 1, 1].tolist(),
            "block_a_to_bridge": own.mass[:, 0, 1].tolist(),
        },
    }


def _per_example(rebuilt: Rebuilt, examples: int) -> np.ndarray:
    return np.bincount(rebuilt.example, weights=rebuilt.bits, minlength=examples)


def _geometry(
    folder: Path,
    settings: EvaluateConfig,
    sides: tuple[Sequence[Content], Sequence[Content]],
    tick: Callable[[int], object],
) -> dict[str, float]:
    embedder = Embedder(folder, settings, untrained=True)  # a stage that lacks a token of the last one is shown too
    pictures, words = (embedder.embed_contents(side, tick=tick) for side in sides)
    both = np.concatenate([pictures, words])
    return {
        "effective_rank": effective_rank(both),
        "pictures_effective_rank": effective_rank(pictures),
        "words_effective_rank": effective_rank(words),
        "uniformity": uniformity(both),
        "alignment": alignment(pictures, words),
    }
