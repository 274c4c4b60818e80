"""Run in a process of its own by test_loop: trains, and is killed (SIGKILL) while it writes the line of a step, or
while it writes a checkpoint.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.training import loop
from cocoa_jax.training.metrics import MetricsWriter


def main(settings: str, fatal: int) -> None:
    config = parse(TrainConfig, json.loads(settings))
    if fatal < 0:
        threading.Thread(target=kill_in_a_save, args=(Path(config.output) / "checkpoints", -fatal), daemon=True).start()
    write = MetricsWriter.write

    def write_or_die(self, step, metrics, load):
        write(self, step, metrics, load)
        if step == fatal:
            with (self._path).open("a") as file:
                file.write('{"step": ' + str(step + 1))  # torn in the middle
            os.kill(os.getpid(), signal.SIGKILL)

    loop.MetricsWriter.write = write_or_die
    loop.train(config)


def kill_in_a_save(folder: Path, step: int) -> None:
    while not any(path.name.startswith(f"{step}.") for path in folder.glob("*tmp*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
