"""Run in a process of its own by test_sets: evaluates, and is killed (SIGKILL) when a set's result is to be written."""

import os
import signal
import sys
from pathlib import Path

from cocoa_jax.evaluation import sets


def main(checkpoint: str, data: str, output: str, fatal: str) -> None:
    write = sets._write

    def write_or_die(path: Path, text: str) -> None:
        if path.stem == fatal:
            path.with_name(path.name + ".partial").write_text(text[: len(text) // 2])  # torn in the middle
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, text)

    sets._write = write_or_die
    wanted = sets.named_sets(sets.MMEB, data, ["VOC2007", "MSCOCO_t2i", "GQA"])
    sets.evaluate_sets(checkpoint, output, wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
