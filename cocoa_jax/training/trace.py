"""An XLA trace of some steps of a run, for TensorBoard's profile plugin or xprof."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from cocoa_jax.config import ProfileConfig


class TraceWindow:
    """Records the steps of a window, and nothing where there is none; what a run ends in the middle of is kept.

    Args:
        window: which steps; None records nothing.
        folder: for ``tensorboard --logdir`` or ``xprof``.
    """

    def __init__(self, window: ProfileConfig | None, folder: Path):
        self._window, self._folder, self._open = window, folder, False

    @contextmanager
    def step(self, number: int, state: Any) -> Iterator[None]:
        """Around the dispatch of step ``number``, which reads ``state``."""
        window = self._window
        if window is not None and not self._open and window.first <= number < window.first + window.steps:
            jax.block_until_ready(state)  # what was dispatched before does not belong here
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def end(self, number: int, state: Any) -> None:
        """After the dispatch of step ``number``, which made ``state``: closes the window behind its last step."""
        if self._open and self._window is not None and number + 1 >= self._window.first + self._window.steps:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._open = False
        jax.profiler.stop_trace()

    def __enter__(self) -> TraceWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._stop()
