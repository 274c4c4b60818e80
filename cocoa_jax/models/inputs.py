"""What a backbone takes: rows of tokens and rows of patches, with everything that depends on sizes as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array

from cocoa_jax.attention.spans import Spans


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Rows of packed examples; B rows, T token slots, P patch slots, C numbers a patch.

    Args:
        tokens: int32 [B, T].
        positions: int32 [B, T, 3], time, height and width of M-RoPE.
        spans: what each token sees, [B, T].
        unit: int32 [B, T], the visual unit of the row that stands in a token's place, -1 for text.
        patches: float [B, P, C], normalised pixels; P is 0 where no row holds a picture.
        patch_positions: int32 [B, P, 2], row and column.
        patch_spans: what each patch sees in a full vision layer, [B, P].
        window_spans: the same in a windowed layer; None for a family without windows.
    """

    tokens: Array
    positions: Array
    spans: Spans
    unit: Array
    patches: Array
    patch_positions: Array
    patch_spans: Spans
    window_spans: Spans | None

    @classmethod
    def from_batch(cls, batch: Mapping[str, Array]) -> Inputs:
        """Take the model's part out of a batch of the data pipeline."""
        windows = Spans(batch["window_start"], batch["window_end"]) if "window_start" in batch else None
        return cls(
            tokens=batch["tokens"],
            positions=batch["positions"],
            spans=Spans(batch["token_start"], batch["token_end"]),
            unit=batch["unit"],
            patches=batch["patches"],
            patch_positions=batch["patch_positions"],
            patch_spans=Spans(batch["patch_start"], batch["patch_end"]),
            window_spans=windows,
        )
