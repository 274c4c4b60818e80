"""Where a run's numbers go: JSON lines, TensorBoard, a progress bar, and Weights & Biases if asked for."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from cocoa_jax.checkpoints.causes import from_network, lacks_room, root_cause
from cocoa_jax.checkpoints.places import carry, is_remote, log_file, twin
from cocoa_jax.training.throughput import Load, Meter
from cocoa_jax.training.weights_and_biases import WandbRun

_PAUSES = (2.0, 8.0, 20.0)  # seconds before logs are tried again at the end, while a network fails
_log = logging.getLogger(__name__)


class MetricsError(RuntimeError):
    """Numbers of a run that cannot be written down; the message names the folder and the cause."""


class MetricsWriter:
    """Writes one line a step to ``metrics.jsonl``, the same to TensorBoard, and moves the bar of the stage.

    Args:
        output: folder of the stage; where it is in a bucket, the files follow at every ``carry``.
        stage: its name, shown on the bar.
        first: the step that comes next; lines of later steps, written before a kill, are dropped.
        steps: length of the whole run.
        meter: turns loads and seconds into rates.
        wandb: gets the same; closed with this.

    Raises:
        MetricsError: here and from every method, what cannot be written to this machine.
    """

    def __init__(
        self, output: str | Path, stage: str, first: int, steps: int, meter: Meter, wandb: WandbRun | None = None
    ):
        self._wandb = wandb
        self._sent: dict[Path, tuple[int, int]] = {}
        self._output, folder, self._meter = output, twin(output), meter
        self._path = log_file(output, "metrics.jsonl")
        with self._written():
            _truncate(self._path, first)
            self._lines = self._path.open("a")
            self._board = _Board(folder / "tensorboard", first)
        self._bar = tqdm(total=steps, initial=first, desc=stage, unit="step", dynamic_ncols=True)
        self._last = time.perf_counter()

    def write(self, step: int, metrics: Mapping[str, float], load: Load) -> None:
        """Record what step ``step`` (from 0) measured on a batch of this load."""
        now = time.perf_counter()
        pace = self._meter.pace(load, now - self._last)
        self._last = now
        values = {**metrics, **load.padding(), **pace}
        with self._written():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
            self._board.write(step, values)
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

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "make room" if lacks_room(error) else "remove the cause"
            raise MetricsError(
                f"metrics could not be written to {twin(self._output)} ({root_cause(error)}): all checkpoints are "
                f"whole, {remedy} and continue by the same command"
            ) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._wandb is not None:
            self._wandb.close()
        for log in (self._board, self._lines):
            with self._written() if kind is None else suppress(OSError):
                log.close()
        # After this nobody brings them: a run that goes on may have no step left to do. With an error already there,
        # which tells how to go on, this one is only logged.
        self._carry(last=True, before=error)


class _Board:
    """Scalars for TensorBoard, each step at once in its file.

    A SummaryWriter leaves that to a thread, which dies where a disk is full: who adds to its queue then waits for ever.
    """

    def __init__(self, folder: Path, first: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)  # hides later steps, written before a kill
        self._events.write_event(Event(wall_time=time.time(), step=first, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time()
        for name, value in values.items():
            self._events.write_event(Event(wall_time=now, step=step, summary=scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


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
