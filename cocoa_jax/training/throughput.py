"""How much of a batch is padding, and how fast steps go by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from cocoa_jax.chips import chip_of_kind
from cocoa_jax.data.pipeline import STATS
from cocoa_jax.training.flops import Work


@dataclasses.dataclass(frozen=True)
class Load:
    """What the global batch of a step holds.

    Args:
        examples: that are encoded; a pair of stage 3 is two of them.
        pictures, tokens, patches: of all of them.
        token_slots, patch_slots: in which they lie; the rest is padding.
        flops: of the step, forward and backward, by ``flops.StepFlops``.
    """

    examples: int
    pictures: int
    tokens: int
    patches: int
    token_slots: int
    patch_slots: int
    flops: float

    def padding(self) -> dict[str, float]:
        """Shares of the slots that hold nothing."""
        shares = {"padding_tokens": 1 - self.tokens / self.token_slots}
        return shares | ({"padding_patches": 1 - self.patches / self.patch_slots} if self.patch_slots else {})


class Meter:
    """Counts the loads of one stage's batches and how fast they pass.

    Args:
        flops: of the step on a batch, such as ``StepFlops``.
        shares: in which a batch is read by the hosts, all of as many rows.
    """

    def __init__(self, flops: Callable[[Work], float], shares: int):
        self._flops, self._shares = flops, shares
        self._devices = jax.device_count()
        chip = chip_of_kind(jax.devices()[0].device_kind)
        self._peak = None if chip is None else chip.peak_flops

    def load(self, batch: Mapping[str, np.ndarray], stats: np.ndarray, predicted: float) -> Load:
        """Of a global batch, from this process's rows, whose pictures stand for those of the others by their patches.

        Args:
            stats: see ``STATS``.
            predicted: tokens that stages 1 and 2 predict in the global batch.
        """
        examples, tokens, patches = (
            int(stats[STATS.index(f"{name}_used")]) for name in ("examples", "tokens", "patches")
        )
        work = Work.of_batch(batch, tokens, patches, predicted)
        # Rows are planned from the fullest to the empty, so the shares do not show as many each.
        own = int(np.sum(batch["patch_end"] > batch["patch_start"]))
        slots = batch["tokens"].size, batch["patches"].shape[0] * batch["patches"].shape[1]
        return Load(
            examples=examples,
            pictures=round(count_pictures(batch) * patches / max(own, 1)),
            tokens=tokens,
            patches=patches,
            token_slots=slots[0] * self._shares,
            patch_slots=slots[1] * self._shares,
            flops=self._flops(work),
        )

    def pace(self, load: Load, seconds: float) -> dict[str, float]:
        """What passed by in a second; TFLOP/s of one device, and their share of its bfloat16 peak if that is known."""
        rate = load.flops / seconds / self._devices
        found = {
            "seconds": round(seconds, 3),
            "pictures_per_second": round(load.pictures / seconds, 1),
            "examples_per_second": round(load.examples / seconds, 1),
            "tokens_per_second": round(load.tokens / seconds, 1),
            "tflops_per_second": rate / 1e12,
        }
        return found if self._peak is None else {**found, "mfu": rate / self._peak}


def count_pictures(batch: Mapping[str, np.ndarray]) -> int:
    """How many pictures the rows of a batch show: patches that are the first of their span."""
    start, end = batch["patch_start"], batch["patch_end"]
    return int(np.sum((end > start) & (start == np.arange(start.shape[1]))))
