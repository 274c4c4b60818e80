"""Where a run's numbers go: JSON lines, TensorBoard, a progress bar, and Weights & Biases if asked for."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter
from tqdm import tqdm

from cocoa_jax.checkpoints.causes import from_network, root_cause
from cocoa_jax.checkpoints.places import carry, is_remote, log_file, twin
from cocoa_jax.training.throughput import Load, Meter
from cocoa_jax.training.weights_and_biases import WandbRun

_PAUSES = (2.0, 8.0, 20.0)  # seconds before logs are tried again at the end, while a network fails
_log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes one line a step to ``metrics.jsonl``, the same to TensorBoard, and moves the bar of the stage.

    Args:
        output: folder of the stage; where it is in a bucket, the files follow at every ``carry``.
        stage: its name, shown on the bar.
        first: the step that comes next; lines of later steps, written before a kill, are dropped.
        steps: length of the whole run.
        meter: turns loads and seconds into rates.
        wandb: gets the same; closed with this.
    """

    def __init__(
        self, output: str | Path, stage: str, first: int, steps: int, meter: Meter, wandb: WandbRun | None = None
    ):
        self._wandb = wandb
        self._sent: dict[Path, tuple[int, int]] = {}
        self._output, folder, self._meter = output, twin(output), meter
        self._path = log_file(output, "metrics.jsonl")
        _truncate(self._path, first)
        self._lines = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self._bar = tqdm(total=steps, initial=first, desc=stage, unit="step", dynamic_ncols=True)
        self._last = time.perf_counter()

    def write(self, step: int, metrics: Mapping[str, float], load: Load) -> None:
        """Record what step ``step`` (from 0) measured on a batch of this load."""
        now = time.perf_counter()
        pace = self._meter.pace(load, now - self._last)
        self._last = now
        values = {**metrics, **load.padding(), **pace}
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, values)
        shown = f"loss {metrics['loss']:.3f}, {pace['examples_per_second']:.0f} examples/s"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def carry(self) -> None:
        """Bring what was written so far to the folder of the stage, where that is not on this machine.

        A failure is logged: the next time brings it all.
        """
        if is_remote(self._output):
            self._board.flush()
            self._carry()

    def _carry(self, *, last: bool = False, before: BaseException | None = None) -> None:
        for pause in (*(_PAUSES if last else ()), None):
            try:
                return carry(self._output, self._sent)
            except Exception as error:  # every package of a network has its own
                if pause is None or not from_network(error, before):
                    told = "logs could not be written to %s (%s): they are in %s"
                    _log.warning(told, self._output, root_cause(error, before), twin(self._output))
                    if last and before is None:
                        raise
                    return None
            time.sleep(pause)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.close()
        self._lines.close()
        # After this nobody brings them: a run that goes on may have no step left to do. With an error already there,
        # which tells how to go on, this one is only logged.
        self._carry(last=True, before=error)


class NoMetrics:
    """A writer that writes nothing: of several processes one writes for all."""

    def write(self, step: int, metrics: Mapping[str, float], load: Load) -> None:
        """Nothing."""

    def carry(self) -> None:
        """Nothing."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _truncate(path: Path, first: int) -> None:
    """Keep the lines of steps before ``first``; a torn last line is dropped too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] < first:
            kept.append(line + "\n")
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept))
    os.replace(aside, path)
