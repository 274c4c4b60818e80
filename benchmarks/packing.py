"""How full rows are, packed and padded: `python -m benchmarks.packing`, a minute.

Packed: stage 3 takes batches of 1,024 pairs of one data set, stages 1 and 2 windows of one or eight batches of the
mixture, in the shapes that a settings file would list. Every slot of every row of the shape counts, those of empty rows
too. Best: what no plan of stage 3 can exceed, because a row holds only so many pictures and rows come in steps. Padded:
one example a row, as published pipelines do, rows as long as the longest of the batch.
`benchmarks/mmeb_lengths.py` says where the lengths come from.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.mmeb_lengths import MmebLengths, rounded_up, shares
from cocoa_jax.data.packing import RowsConfig, plan_batch

# (resolution, T, P). Squares of one size do not divide 2048: longer rows hold a whole number of them.
CASES = (
    ("dynamic:64..256", 2048, 7936),
    ("square:448", 2048, 7168),
    ("square:448", 2240, 8192),
    ("dynamic:64..576", 2432, 9216),
)
BATCHES = 24
# Pairs of a batch of stage 3, and what its number of rows is a multiple of: the devices that share them. A settings
# file lists the shapes that its data sets need.
PUBLISHED = (1024, 8)
# 1,024 squares of 448 pixels, seven a row of 2048 tokens, need 147 rows. Steps of eight make 152 of them, a loss of 3 %
# that no plan avoids; steps of four make 148, and 1,064 squares fill 152.
MORE = {("square:448", 2048): {"3, rows by 4": (1024, 4), "3, 1064 pairs": (1064, 8)}}
SHOWN = ("tokens", "best", "patches", "padded_to_longest")


def columns(lengths: np.ndarray) -> np.ndarray:
    """Tokens and patches as the packer takes them: nothing hidden, the masks of a row have room of their own."""
    return np.column_stack([lengths, np.zeros(len(lengths), int)])


def least_rows(lengths: np.ndarray, row: tuple[int, int]) -> int:
    """No plan takes fewer: for the slots, and for the pictures, of which so many of the smallest fit into a row."""
    shown = lengths[lengths[:, 1] > 0]
    a_row = (np.array(row) // shown.min(axis=0)).min() if len(shown) else 1
    return int(np.ceil(max((lengths.sum(axis=0) / row).max(), len(shown) / a_row)))


def stage_3(
    draws: MmebLengths, row: tuple[int, int], rng: np.random.Generator, size: int = 1024, step: int = 8
) -> dict[str, float]:
    """Batches of ``size`` pairs of one data set each, drawn in proportion to the caps, a multiple of ``step`` rows."""
    names, weights = zip(*shares().items(), strict=True)
    used, slots, padded, shapes, seconds, best = np.zeros(2), np.zeros(2), np.zeros(2), set(), 0.0, 0
    for name in rng.choice(names, BATCHES, p=weights):
        pairs = draws.draw(str(name), size, rng)
        lengths = pairs.transpose(1, 0, 2).reshape(-1, 2)
        least = rounded_up(least_rows(lengths, row), step)
        best += least * row[0]
        listed = tuple((least + step * more, *row) for more in range(8))
        began = time.perf_counter()
        shape, rows = plan_batch(columns(lengths), RowsConfig(size, listed, 256, 1))
        seconds += time.perf_counter() - began
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        used += lengths.sum(axis=0)
        slots += np.array(row) * shape.rows
        padded += [size * side for side in pairs[..., 0].max(axis=0)]
        shapes.add(shape)
    return {
        "tokens": used[0] / slots[0],
        "patches": used[1] / slots[1],
        "best": used[0] / best,
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

    def fill(size: int, windows: int) -> tuple[np.ndarray, np.ndarray, int, float]:
        """Slots used, slots there, windows in the larger shape and padded tokens, of batches of ``size`` records."""
        config = RowsConfig(size, tuple((rows + more, *row) for more in (0, 8, 16)), 256, 1, window)
        used, slots, larger, padded = np.zeros(2), np.zeros(2), 0, 0.0
        for _ in range(windows):
            lengths = records(size * window)
            shape, plan = plan_batch(columns(lengths), config)
            assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
            used += lengths.sum(axis=0)
            slots += np.array(row) * shape.rows * window
            larger += shape.rows > rows
            padded += size * sum(lengths[b::window, 0].max() for b in range(window))
        return used, slots, larger, padded

    def tried(size: int) -> float:
        used, slots, *_ = fill(size, max(4, 32 // window))
        return float(used[0] / slots[0])

    # As many records a batch as fill the rows best, larger shapes counted, in draws of their own.
    size = max((int(load * rows / mean) for load in np.arange(0.88, 0.985, 0.01)), key=tried)
    used, slots, extra, padded = fill(size, max(4, 64 // window))
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
    heads = ("tokens %", "best %", "patches %", "padded, tokens %")
    print(f"{'resolution':16} {'T':>5} {'P':>5} {'stage':14}" + "".join(f"{head:>{len(head) + 1}}" for head in heads))
    for resolution, *row in CASES:
        draws, rng = MmebLengths(resolution), np.random.default_rng(0)
        listed = {"3": PUBLISHED} | MORE.get((resolution, row[0]), {})
        case = {
            name: stage_3(draws, (row[0], row[1]), np.random.default_rng(0), *given) for name, given in listed.items()
        }
        case |= {f"1, 2 window {w}": stages_1_and_2(draws, (row[0], row[1]), rng, w) for w in (1, 8)}
        for stage, got in case.items():
            shown = [f"{100 * got[key]:.1f}" if key in got else "" for key in SHOWN]
            line = "".join(f"{value:>{len(head) + 1}}" for head, value in zip(heads, shown, strict=True))
            print(f"{resolution:16} {row[0]:5} {row[1]:5} {stage:14}{line}", flush=True)
        found[f"{resolution} T={row[0]} P={row[1]}"] = case
    if given.output:
        given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
