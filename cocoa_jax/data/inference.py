"""Contents -> batches of rows for inference, built by threads while the ones before are used."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from cocoa_jax.data.batches import lengths_of
from cocoa_jax.data.example import Example
from cocoa_jax.data.packing import ALONE, PackingError, RowsConfig, RowShare, Shape, check_fits, plan_batch, plan_rows
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.rows import Arrays, VisibilityConfig, write_rows

if TYPE_CHECKING:
    from cocoa_jax.data.sources import Content

_WINDOW = 8  # rows are planned over this many batches at once, so that they fill up and lengths are alike
_AHEAD = 8 * 2**30  # bytes of pixels in batches that are built ahead


def embedding_rows(
    contents: Sequence[Content],
    processor: Processor,
    rows: RowsConfig,
    visibility: VisibilityConfig,
    share: RowShare = ALONE,
    threads: int = 1,
) -> Iterator[tuple[Arrays, Int32[np.ndarray, "B E"]]]:
    """Pack contents into batches for inference, every content in exactly one.

    Contents are planned over windows of a few batches, the longest first, into rows of the widest shape; each batch
    then gets the first shape that holds its contents. ``batch_size`` contents are about one batch.

    Args:
        threads: that build batches while the ones before are used, one each; fewer where those would take 8 GiB.

    Yields:
        This process's rows of a batch (the model's arrays and ``pool``), and which content each example slot of all
        its rows holds, -1 for none. Every process looks at every content, and decodes the pictures of its own rows.
    Raises:
        ExampleError, ImageError, PackingError: naming the content.
    """
    plans = _plans(contents, processor, rows, share)
    pixels = 4 * processor.config.vision.patch_values * rows.widest.patches * rows.widest.rows // share.count
    ahead = max(1, min(threads, _AHEAD // max(pixels, 1)))

    def build(examples: Mapping[int, Example], own: list[list[int]], shape: Shape) -> Arrays:
        return write_rows(examples, own, processor, shape, rows.examples_per_row, visibility, truncated=False)

    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque[tuple[Future[Arrays], Int32[np.ndarray, "B E"]]] = deque()
        try:
            for examples, own, shape, held in plans:
                waiting.append((pool.submit(build, examples, own, shape), held))
                if len(waiting) > ahead:
                    first, places = waiting.popleft()
                    yield first.result(), places
            for first, places in waiting:
                yield first.result(), places
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _plans(
    contents: Sequence[Content], processor: Processor, rows: RowsConfig, share: RowShare
) -> Iterator[tuple[Mapping[int, Example], list[list[int]], Shape, Int32[np.ndarray, "B E"]]]:
    """By batch: examples, this process's rows of them, the shape, and what each slot of all rows holds."""
    rows = dataclasses.replace(rows, window=1)
    widest, slots = rows.widest, rows.examples_per_row
    if not widest.patches and any(content.images or content.videos for content in contents):
        raise PackingError("rows.shapes has no patches and there are pictures to embed: give it a shape with patches")
    capacity = (widest.tokens, widest.patches, rows.masked_per_row)
    window = _WINDOW * rows.batch_size
    for start in range(0, len(contents), window):
        examples = {}
        for i in range(start, min(start + window, len(contents))):
            examples[i] = processor.embedding(contents[i], widest.tokens)
            check_fits(len(examples[i].tokens), examples[i].patches, rows, f"content {i}")
        lengths = lengths_of(examples, {})
        plan = plan_rows(lengths, capacity, slots)
        for first in range(0, len(plan), widest.rows):
            # Some rows of a first-fit plan, planned again alone, need no more rows than they are.
            chosen = np.sort(np.concatenate(plan[first : first + widest.rows]))
            shape, packed = plan_batch(lengths[chosen], rows)
            part = [[start + int(i) for i in chosen[row]] for row in packed]
            part += [[] for _ in range(shape.rows - len(part))]
            held = np.full((len(part), slots), -1, np.int32)
            for row, members in enumerate(part):
                held[row, : len(members)] = members
            yield examples, [part[row] for row in share.of(len(part))], shape, held
