"""How full rows are, packed and padded: `python -m benchmarks.packing`, a minute.

Packed: stage 3 takes batches of 1,024 pairs of one data set, stages 1 and 2 windows of one or eight batches of the
mixture, in the shapes that a settings file would list. Every slot of every row of the shape counts, those of empty rows
too. Padded: one example a row, as published pipelines do, rows as long as the longest of the batch.
`benchmarks/mmeb_lengths.py` says where the lengths come from.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.mmeb_lengths import MmebLengths, shares
from cocoa_jax.data.packing import RowsConfig, plan_batch

# (resolution, T, P). Squares of one size do not divide 2048: longer rows hold a whole number of them.
CASES = (
    ("dynamic:64..256", 2048, 7936),
    ("square:448", 2048, 7168),
    ("square:448", 2240, 8192),
    ("dynamic:64..576", 2432, 9216),
)
PAIRS, BATCHES = 1024, 24
ROWS_STEP = 8  # rows of the shapes of stage 3; a settings file lists those that its data sets need


def columns(lengths: np.ndarray) -> np.ndarray:
    """Tokens and patches as the packer takes them: nothing hidden, the masks of a row have room of their own."""
    return np.column_stack([lengths, np.zeros(len(lengths), int)])


def stage_3(draws: MmebLengths, row: tuple[int, int], rng: np.random.Generator) -> dict[str, float]:
    """Batches of one data set each, drawn in proportion to the caps."""
    names, weights = zip(*shares().items(), strict=True)
    used, slots, padded, shapes, seconds = np.zeros(2), np.zeros(2), np.zeros(2), set(), 0.0
    for name in rng.choice(names, BATCHES, p=weights):
        pairs = draws.draw(str(name), PAIRS, rng)
        lengths = pairs.transpose(1, 0, 2).reshape(-1, 2)
        least = int(np.ceil((lengths.sum(axis=0) / row).max() / ROWS_STEP)) * ROWS_STEP
        listed = tuple((least + ROWS_STEP * more, *row) for more in range(8))
        began = time.perf_counter()
        shape, rows = plan_batch(columns(lengths), RowsConfig(PAIRS, listed, 256, 1))
        seconds += time.perf_counter() - began
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        used += lengths.sum(axis=0)
        slots += np.array(row) * shape.rows
        padded += [PAIRS * side for side in pairs[..., 0].max(axis=0)]
        shapes.add(shape)
    return {
        "tokens": used[0] / slots[0],
        "patches": used[1] / slots[1],
        "padded_to_longest": used[0] / padded.sum(),
        "shapes": len(shapes),
        "plan_ms": 1000 * seconds / BATCHES,
    }


def stages_1_and_2(draws: MmebLengths, row: tuple[int, int], rng: np.random.Generator, window: int) -> dict[str, float]:
    """Batches of 64 rows of the mixture; one example a record, query and target together."""
    names, weights = zip(*shares().items(), strict=True)

    def records(count: int) -> np.ndarray:
        kinds = rng.multinomial(count, weights)
        both = np.concatenate([draws.draw(name, n, rng) for name, n in zip(names, kinds, strict=True) if n]).sum(axis=1)
        return both[rng.permutation(count)]

    rows = 64
    mean = (records(4096).mean(axis=0) / row).max()
    # As many records a batch as four trial windows hold without ever asking for the larger shape.
    for load in np.arange(0.98, 0.7, -0.01):
        config = RowsConfig(int(load * rows / mean), ((rows, *row), (rows + 8, *row)), 256, 1, window)
        size = config.batch_size
        if all(plan_batch(columns(records(size * window)), config)[0].rows == rows for _ in range(4)):
            break
    used, slots, extra, padded = np.zeros(2), np.zeros(2), 0, 0
    for _ in range(max(2, 64 // window)):
        lengths = records(size * window)
        shape, plan = plan_batch(columns(lengths), config)
        assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
        used += lengths.sum(axis=0)
        slots += np.array(row) * shape.rows * window
        extra += shape.rows > rows
        padded += size * sum(lengths[b::window, 0].max() for b in range(window))
    return {
        "tokens": used[0] / slots[0],
        "patches": used[1] / slots[1],
        "padded_to_longest": used[0] / padded,
        "records": size,
        "larger_shape": extra,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write the numbers to")
    given = parser.parse_args(arguments)
    found = {}
    print(f"{'resolution':16} {'T':>5} {'P':>5} {'stage':14} {'tokens %':>9} {'patches %':>9} {'padded, tokens %':>17}")
    for resolution, *row in CASES:
        draws, rng = MmebLengths(resolution), np.random.default_rng(0)
        case = {"3": stage_3(draws, (row[0], row[1]), rng)}
        case |= {f"1, 2 window {w}": stages_1_and_2(draws, (row[0], row[1]), rng, w) for w in (1, 8)}
        for stage, got in case.items():
            shown = (100 * got[key] for key in ("tokens", "patches", "padded_to_longest"))
            line = "{:9.1f} {:9.1f} {:17.1f}".format(*shown)
            print(f"{resolution:16} {row[0]:5} {row[1]:5} {stage:14} {line}", flush=True)
        found[f"{resolution} T={row[0]} P={row[1]}"] = case
    if given.output:
        given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
