"""Run in a process of its own by test_loop: trains, and is killed (SIGKILL) while it writes the line of a step."""

import json
import os
import signal
import sys

from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.training import loop
from cocoa_jax.training.metrics import MetricsWriter


def main(settings: str, fatal: int) -> None:
    write = MetricsWriter.write

    def write_or_die(self, step, metrics, pictures):
        write(self, step, metrics, pictures)
        if step == fatal:
            with (self._path).open("a") as file:
                file.write('{"step": ' + str(step + 1))  # torn in the middle
            os.kill(os.getpid(), signal.SIGKILL)

    loop.MetricsWriter.write = write_or_die
    loop.train(parse(TrainConfig, json.loads(settings)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
