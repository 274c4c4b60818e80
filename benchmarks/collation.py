"""Batches of stage 3 beside the collation of published pipelines: `python -m benchmarks.collation CHECKPOINT`.

The same JPEGs and texts, two cores. Theirs, in one process: open, convert, squash to the side, one call of the
transformers processor a row, then padding to the longest and one tensor (the collator of VLM2Vec; its pixel values are
joined, not padded). Ours: the pipeline of `cocoa train` with two worker processes or threads, packed rows, from the
JPEGs and from data that `cocoa data build` made of them. In turns, in one run, nobody else's workers alive; wall
seconds, and pairs a second.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from benchmarks.jpegs import JpegSource, make_jpegs
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.pipeline import BatchConfig, stage_batches
from cocoa_jax.data.prepare import BuildConfig, build
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig

SIDE, BATCH, PICTURES, TURNS, BATCHES = 448, 32, 64, 3, 5
FULL = 6  # batches that a worker and its threads hold ready at most; they are taken before the clock starts
ROWS = RowsConfig(BATCH, ((5, 2048, 7168), (6, 2048, 7168)), 64, 1)


def their_batches(source: JpegSource, folder: str) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of query and target sides, padded."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=SIDE**2, max_pixels=SIDE**2)

    def row(text: str, data: bytes | None) -> dict[str, Any]:
        """One call a row, as the processor does it: pixels, then as many image tokens in the text, then ids."""
        seen: dict[str, Any] = {}
        if data is not None:
            with PIL.Image.open(io.BytesIO(data)) as opened:
                seen = dict(pictures(images=[opened.convert("RGB").resize((SIDE, SIDE))], return_tensors="np"))
            tokens = int(seen["image_grid_thw"].prod()) // pictures.merge_size**2
            text = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>{text}"
        return seen | {"input_ids": tokenizer(text, truncation=True, max_length=2048)["input_ids"]}

    def padded(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        batch = dict(
            tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], padding=True, return_tensors="np")
        )
        if "pixel_values" in rows[0]:
            batch["pixel_values"] = np.concatenate([row["pixel_values"] for row in rows])
        return batch

    place = 0
    while True:
        records = [source.record((place + i) % len(source)) for i in range(BATCH)]
        place += BATCH
        queries = padded([row(r.query.text, r.query.images[0].data) for r in records])
        targets = padded([row(r.target.text, None) for r in records])
        yield queries | {f"target_{name}": value for name, value in targets.items()}


def seconds_a_batch(batches: Iterator[Any], warm: int, count: int) -> float:
    """Of ``count`` batches after ``warm`` others."""
    for _ in range(warm):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - began) / count


def main(arguments: Sequence[str] | None = None) -> None:
    """Pairs a second of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="whose tokenizer and picture settings count")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    backbone = open_backbone(given.checkpoint)
    folder = backbone.side_files
    processor = Processor.load(folder, backbone.config, ProcessorConfig(resolution=f"square:{SIDE}"))
    source = JpegSource(tuple(make_jpegs(PICTURES)))
    with tempfile.TemporaryDirectory() as output:
        prepared = build("jpegs", source, "benchmark", processor, output, BuildConfig(workers=0))

        def ours(chosen: Any, threads: int, workers: int) -> Any:
            batches = stage_batches(
                BatchConfig("contrastive", ROWS), {"it": chosen}, {"it": 1.0}, processor,
                seed=0, steps=10**6, threads=threads, workers=workers,
            )  # fmt: skip
            return iter(batches)

        n = given.workers
        sides = {
            f"JPEGs, {n} processes": (source, 1, n),
            f"JPEGs, {n} threads": (source, n, 0),
            f"prepared, {n} processes": (prepared, 1, n),
            f"prepared, {n} threads": (prepared, n, 0),
        }
        seconds: dict[str, list[float]] = {"theirs": [], **{name: [] for name in sides}}
        theirs = their_batches(source, str(folder))
        for _ in range(TURNS):
            seconds["theirs"].append(seconds_a_batch(theirs, 1, BATCHES))
            for name, how in sides.items():
                # Workers that live on would fill their buffers in the others' turn, and take its cores.
                batches = ours(*how)
                seconds[name].append(seconds_a_batch(batches, FULL * n, BATCHES * n))
                batches.close()
        base = np.array(seconds["theirs"])
        for name, each in seconds.items():
            ratio = float(np.median(base / np.array(each)))
            print(f"{name:22} {BATCH / np.median(each):7.1f} pairs/s, {ratio:.2f} of theirs")


if __name__ == "__main__":
    main()
