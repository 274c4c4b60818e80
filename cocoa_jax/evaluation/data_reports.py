"""What a stage would be fed: a page of its rows, and a list of its bad records."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.places import is_remote
from cocoa_jax.config import SettingsError, TrainConfig
from cocoa_jax.data.bad import KnownBad
from cocoa_jax.data.intake import check
from cocoa_jax.data.pipeline import STATS, stage_dataset
from cocoa_jax.data.processor import Processor
from cocoa_jax.evaluation.inspection import read_rows
from cocoa_jax.evaluation.inspection_page import write_page
from cocoa_jax.training.inputs import known_bad, open_sources


def inspect_data(config: TrainConfig, step: int, rows: int) -> None:
    """Draw rows of the batch that ``step`` of this run is fed, as the page ``config.output``.

    Raises:
        SettingsError: no such step; whatever opening the data and building the batch raise.
    """
    _check_suffix(config.output, ".html")
    if step < 0 or rows < 1:
        raise SettingsError(f"step is {step} and rows {rows}: steps start at 0, rows at 1")
    mixture, processor = open_sources(config), _processor(config)
    batches = stage_dataset(
        config.batches(), mixture.sources, mixture.weights, processor, seed=config.seed, steps=step + 1,
        known=known_bad(config, mixture),
    )  # fmt: skip
    batch, window = batches[step], config.data.rows.window
    stats = dict(zip(STATS, batch["stats"].tolist(), strict=True))
    # What was left out of a window is counted in its first batch, for all of its steps.
    counted = stats if window == 1 else dict(zip(STATS, batches[step - step % window]["stats"].tolist(), strict=True))
    others = "Others" if window == 1 else f"In its window of {window} steps others"
    tokens, patches = batch["tokens"], batch["patches"]
    fill = [
        f"Step {step} of seed {config.seed} has {stats['rows_used']} rows of {len(tokens)}: "
        f"{stats['tokens_used'] / tokens.size:.0%} of {tokens.size} token slots and "
        f"{stats['patches_used'] / max(1, patches[..., 0].size):.0%} of {patches[..., 0].size} patch slots are used.",
        f"{others} stand in for {counted['bad_records']} bad records; {counted['dropped_masks']} tokens were not "
        "hidden for want of room.",
        f"The data have the fingerprint {mixture.fingerprint}.",
    ]
    whole = sum(mixture.weights.values())
    datasets = [
        {"Data set": name, "Records": f"{len(source):,}", "Share": f"{mixture.weights[name] / whole:.1%}"}
        for name, source in sorted(mixture.sources.items())
    ]
    drawn = read_rows(batch, processor, rows, bridge=config.stage == "bridge")
    write_page(Path(config.output), f"Rows of the {config.stage} stage", fill, datasets, drawn)


def check_data(config: TrainConfig) -> tuple[int, int]:
    """Read and decode every record and list the bad ones in ``config.output``; returns how many there are, and bad.

    Raises:
        SettingsError: the output is no .json; whatever opening the data raises.
    """
    _check_suffix(config.output, ".json")
    mixture, processor = open_sources(config), _processor(config)
    reasons: dict[str, dict[int, str]] = {name: {} for name in mixture.sources}
    total = sum(map(len, mixture.sources.values()))
    found = check(config.batches(), mixture.sources, processor, config.seed, max(1, config.data.threads))
    for name, index, reason in tqdm(found, total=total, desc="check", unit="record", leave=False):
        if reason:
            reasons[name][index] = reason
    sizes = {name: len(source) for name, source in mixture.sources.items()}
    KnownBad(mixture.fingerprint, config.data.negatives, sizes, reasons).save(Path(config.output))
    return total, sum(map(len, reasons.values()))


def _check_suffix(output: str, suffix: str) -> None:
    # A stage's own settings name its folder, which is no place to overwrite.
    if Path(output).suffix != suffix or is_remote(output):
        raise SettingsError(f"output is {output}: give --output=NAME{suffix}, on this machine")


def _processor(config: TrainConfig) -> Processor:
    backbone = open_backbone(config.checkpoint)
    return Processor.load(backbone.side_files, backbone.config, config.data.processor)
