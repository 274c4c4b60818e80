"""`cocoa data build` beside what plain Pillow needs for the same JPEGs: `python -m benchmarks.data_build CHECKPOINT`.

Each worker takes turns with the same pictures: plain Pillow (open, resize to the same size, save with the same quality)
and the build (the record read, its picture measured, decoded, resized and saved, its texts tokenized for three stages,
its shard written and hashed). All workers do the same at the same time. Seconds are the wall's and the processes' own:
the latter do not count what other programs on the machine take away.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from benchmarks.jpegs import JpegSource, make_jpegs
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.data.prepare_shard import PARTS, Work, write_shard
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig

RESOLUTION, QUALITY, ROUNDS = "square:448", 95, 5


def plain_pillow(jpegs: Sequence[bytes], side: int) -> int:
    """Decode, resize, encode; returns bytes."""
    total = 0
    for data in jpegs:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            small = opened.convert("RGB").resize((side, side), PIL.Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=QUALITY)
        total += len(buffer.getvalue())
    return total


def take_turns(processor: Processor, jpegs: tuple[bytes, ...], results: Any, barrier: Any) -> None:
    """One worker: [rounds, 2 (pillow, build), 2 (wall, own)] seconds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PARTS).mkdir()
        work = Work(JpegSource(jpegs), processor, folder, "jpegs", QUALITY, len(jpegs), "")
        seconds = np.zeros((ROUNDS + 1, 2, 2))
        for turn in range(ROUNDS + 1):
            for side, run in enumerate(
                (lambda: plain_pillow(jpegs, 448), lambda: write_shard(work, 0, 1, lambda _: None))
            ):
                barrier.wait()
                began = time.perf_counter(), time.process_time()
                run()
                seconds[turn, side] = time.perf_counter() - began[0], time.process_time() - began[1]
    results.put(seconds[1:])  # the first turn warms caches


def main(arguments: Sequence[str] | None = None) -> None:
    """Both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="whose tokenizer counts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=100, help="of each worker and turn")
    given = parser.parse_args(arguments)
    backbone = open_backbone(given.checkpoint)
    processor = Processor.load(backbone.side_files, backbone.config, ProcessorConfig(resolution=RESOLUTION))
    jpegs = tuple(make_jpegs(given.pictures))
    context = multiprocessing.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(given.workers)
    workers = [
        context.Process(target=take_turns, args=(processor, jpegs, results, barrier)) for _ in range(given.workers)
    ]
    for worker in workers:
        worker.start()
    found = np.stack([results.get(timeout=900) for _ in workers])
    for worker in workers:
        worker.join()
    for name, column in (("wall", 0), ("own", 1)):
        # All workers together: pictures of a turn over the slowest worker's seconds, or over the mean of their own.
        each = found[..., column].max(axis=0) if name == "wall" else found[..., column].mean(axis=0)
        pillow, ours = (given.workers * given.pictures / np.median(each[:, side]) for side in (0, 1))
        ratio = np.median(each[:, 0] / each[:, 1])
        print(f"{name:4} seconds: Pillow {pillow:7.1f} pictures/s, build {ours:7.1f} pictures/s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
