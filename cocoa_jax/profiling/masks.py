"""The masks that attention is profiled under, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cocoa_jax.attention import spans
from cocoa_jax.attention.spans import Spans

WINDOW = 64  # patches of one window of Qwen2.5-VL's vision tower, 112 x 112 pixels
PACKED = (1100, 700, 1300, 996)  # documents of a row of 4096 tokens, in proportion for other lengths


def documents(lengths: tuple[int, ...], total: int) -> tuple[int, ...]:
    """Lengths in these proportions that fill a row of ``total`` tokens."""
    ends = [round(total * sum(lengths[: i + 1]) / sum(lengths)) for i in range(len(lengths))]
    return tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))


def _bridge(lengths: tuple[int, ...], total: int) -> Spans:
    """Documents side by side, each truncated at a bridge token at three quarters of it."""
    whole = spans.segments(lengths, total)
    at = whole.start + (whole.end - whole.start) * 3 // 4
    return spans.truncated(whole, Spans(at, at + 1))


def _windows(total: int) -> list[int]:
    """Whole windows, and what is left."""
    return [min(WINDOW, total - at) for at in range(0, total, WINDOW)]


_MAKERS: dict[str, Callable[[int], Spans]] = {
    "full": lambda total: spans.segments([total], total),
    "causal": lambda total: spans.causal(spans.segments([total], total)),
    "bridge": lambda total: _bridge((total,), total),
    "packed": lambda total: spans.segments(documents(PACKED, total), total),
    "packed-bridge": lambda total: _bridge(documents(PACKED, total), total),
    "windows": lambda total: spans.segments(_windows(total), total),
}
MASKS = tuple(_MAKERS)


def mask_spans(name: str, total: int, rows: int = 1) -> Spans:
    """Spans [rows, total], int32: one document (full, causal, bridge), four packed side by side, or windows.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _MAKERS:
        raise ValueError(f"mask {name!r} is unknown: choose from {', '.join(MASKS)}")
    one = _MAKERS[name](total)
    return Spans(*(np.tile(np.asarray(side, np.int32), (rows, 1)) for side in (one.start, one.end)))


def segment_ids(name: str, total: int) -> np.ndarray:
    """The document of each token, int32 [total], for kernels that know documents only."""
    lengths = documents(PACKED, total) if name.startswith("packed") else (total,)
    lengths = tuple(_windows(total)) if name == "windows" else lengths
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
