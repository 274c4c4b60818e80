"""How fast a host makes the batches of a stage, and how many chips that would feed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import numpy as np
from tqdm import tqdm

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import SettingsError, TrainConfig
from cocoa_jax.data.pipeline import STATS, stage_batches
from cocoa_jax.data.processor import Processor
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.qwen2_vl import abstract_params
from cocoa_jax.training.inputs import known_bad, open_sources


@dataclasses.dataclass(frozen=True)
class DataSpeed:
    """What was measured on this host.

    Args:
        records: of a global batch.
        tokens, patches: used, of all batches together; ``token_slots`` and ``patch_slots`` are what there was room for.
    """

    seconds: float
    batches: int
    records: int
    rows: int
    tokens: int
    patches: int
    token_slots: int
    patch_slots: int
    shapes: Mapping[str, int]

    def lines(self) -> list[str]:
        """As it is printed."""
        fill = f"{self.tokens / self.token_slots:.1%} of token slots"
        if self.patch_slots:
            fill += f", {self.patches / self.patch_slots:.1%} of patch slots"
        return [
            f"{self.batches} batches in {self.seconds:.1f} s: {1000 * self.seconds / self.batches:.0f} ms a batch",
            f"{self.records * self.batches / self.seconds:.1f} records/s, {self.rows / self.seconds:.1f} rows/s, "
            f"{self.tokens / self.seconds:.0f} tokens/s, {self.patches / self.seconds:.0f} patches/s",
            f"fill: {fill}",
            *(f"shape {shape}: {count} batches" for shape, count in sorted(self.shapes.items())),
        ]


def measure_data(config: TrainConfig, seconds: float) -> DataSpeed:
    """Make batches as training does, with its threads and workers, for about so many seconds after two to warm up.

    Raises:
        SettingsError: a time that is none; whatever opening the data and building batches raise.
    """
    if not 0 < seconds < math.inf:
        raise SettingsError(f"seconds is {seconds}: give a positive number")
    mixture, backbone = open_sources(config), open_backbone(config.checkpoint)
    processor = Processor.load(backbone.side_files, backbone.config, config.data.processor)
    batches = iter(
        stage_batches(
            config.batches(),
            mixture.sources,
            mixture.weights,
            processor,
            seed=config.seed,
            steps=10**9,
            known=known_bad(config, mixture),
            threads=config.data.threads,
            workers=config.data.workers,
        )
    )
    # What was made ahead while nobody asked is no speed: at least as many as all buffers hold.
    for _ in range(2 + 2 * config.data.threads * max(1, config.data.workers)):
        next(batches)
    total, slots, shapes, count = np.zeros(len(STATS)), np.zeros(2), dict[str, int](), 0
    began = time.perf_counter()
    with tqdm(total=round(seconds), desc="batches", unit="s", leave=False) as bar:
        while (passed := time.perf_counter() - began) < seconds or not count:
            batch = next(batches)
            total += batch["stats"]
            slots += [batch["tokens"].size, batch["patches"][..., 0].size]
            name = f"{batch['tokens'].shape[0]} x {batch['tokens'].shape[1]} x {batch['patches'].shape[1]}"
            shapes[name] = shapes.get(name, 0) + 1
            count += 1
            bar.update(min(round(seconds), int(passed)) - bar.n)
    passed = time.perf_counter() - began
    if config.data.workers:
        batches.close()
    rows, tokens, patches = (int(total[STATS.index(f"{name}_used")]) for name in ("rows", "tokens", "patches"))
    return DataSpeed(
        passed, count, config.data.rows.batch_size, rows, tokens, patches, int(slots[0]), int(slots[1]), shapes
    )


def flops_of_a_slot(config: Qwen2VLConfig) -> tuple[float, float]:
    """FLOPs of training one token slot and one patch slot: six for each parameter that it meets.

    Attention over other tokens and what is computed twice are left out: a chip in fact needs longer than this says,
    and less data.
    """
    shapes = abstract_params(config)
    sizes = {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    embedding = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["text"]["embed"]))
    return 6.0 * (sizes["text"] - embedding), 6.0 * sizes["vision"]


def chips_fed(speed: DataSpeed, config: Qwen2VLConfig, peak_flops: float, utilisation: float) -> float:
    """How many chips take as much as one host makes, if they reach this share of their peak; a static model."""
    token, patch = flops_of_a_slot(config)
    return (speed.token_slots * token + speed.patch_slots * patch) / speed.seconds / (utilisation * peak_flops)
