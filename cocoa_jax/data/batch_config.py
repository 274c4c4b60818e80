"""What a batch is made by, beside its records."""

from __future__ import annotations

import dataclasses
from typing import Literal

from cocoa_jax.data.bad import BadConfig
from cocoa_jax.data.masking import MaskingConfig
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.rows import VisibilityConfig
from cocoa_jax.data.sources import MOST_NEGATIVES

Stage = Literal["warmup", "bridge", "contrastive"]


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """All that a batch depends on beside its records, its seed and its step.

    Args:
        masking: what to hide; None in stage 3.
        negatives: hard negatives taken from each record of stage 3, fewer from one that has fewer; 8 at most.
        interleave: stage 3, in how many equal parts a batch is drawn, each from one source.
        bad: what happens to records that cannot be used.
        steps: length of the run, over which mask ratios may move.
    """

    stage: Stage
    rows: RowsConfig
    visibility: VisibilityConfig = dataclasses.field(default_factory=VisibilityConfig)
    masking: MaskingConfig | None = None
    negatives: int = 0
    interleave: int = 1
    bad: BadConfig = dataclasses.field(default_factory=BadConfig)
    steps: int = 1

    @property
    def rebuilds_pictures(self) -> bool:
        """Whether parts of pictures are hidden and rebuilt: in stage 1, and by their ratio in stage 2."""
        hides = self.masking is not None and self.masking.hides_units
        return self.stage == "warmup" or (self.stage == "bridge" and hides)

    def __post_init__(self) -> None:
        if (self.masking is None) != (self.stage == "contrastive"):
            raise ValueError(f"stage {self.stage!r} with masking={self.masking}: stages 1 and 2 need it, 3 has none")
        if self.stage == "bridge" and self.visibility.attention != "bidirectional":
            raise ValueError("stage 'bridge' is truncated at the bridge, not causal: set attention to 'bidirectional'")
        if not 0 <= self.negatives <= MOST_NEGATIVES:
            raise ValueError(
                f"negatives is {self.negatives}: a record brings {MOST_NEGATIVES} wrong targets at most, set 0 to that"
            )
        if self.negatives and self.stage != "contrastive":
            raise ValueError(f"stage {self.stage!r} has no use for {self.negatives} negatives: set negatives to 0")
        if self.interleave < 1 or self.rows.batch_size % self.interleave:
            raise ValueError(
                f"interleave is {self.interleave} for a batch_size of {self.rows.batch_size}: choose a divisor of it"
            )
        if self.rows.window > 1 and self.stage == "contrastive":
            raise ValueError(f"rows.window is {self.rows.window}: a batch of stage 3 is planned alone, set it to 1")
        if self.interleave > 1 and self.stage != "contrastive":
            raise ValueError(f"stage {self.stage!r} mixes its sources record by record: set interleave to 1")
