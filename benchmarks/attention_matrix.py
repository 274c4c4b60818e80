"""The whole matrix of docs/attention.md: chip by pass by length, compiled for TPUs that are not here; one command.

    python benchmarks/attention_matrix.py --output docs/attention

It can be stopped at any time and continued: every cell is a file, made again only where the code that it depends on
has changed. A cell takes seconds to minutes of one core. No figure here is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cocoa_jax.profiling.attention import profile_attention
from cocoa_jax.profiling.report import write_attention

TOPOLOGY = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
PASSES = {"forward": False, "backward": True}  # backward: both passes together
LENGTHS = (1024, 2048, 4096)
LONG = (8192, 16384)  # without the dense reference, whose scores fill the memory of a chip
MASKS = ("full", "causal", "bridge", "packed-bridge")
VISION = {"heads": (16, 16), "width": 80}  # of the vision tower of the 2B backbone


def text_tower(chip: str, which: str, rows: int, lengths: list[int], output: Path) -> None:
    """12 query and 2 key heads of width 128 under the masks of the method, beside splash and dense attention."""
    folder = output / f"{chip}-{which}{f'-{rows}-rows' if rows > 1 else ''}"
    found = []
    for length in lengths:
        names = ["splash", "flash_tpu"] if length in LONG or rows > 1 else ["reference", "splash", "flash_tpu"]
        found += profile_attention(
            TOPOLOGY[chip], [length], MASKS, names, PASSES[which], rows, cells=folder / "cells", say=_say
        )
    write_attention(found, folder)


def vision_tower(chip: str, which: str, lengths: list[int], output: Path) -> None:
    """16 heads of width 80 under windows of 64 patches, beside dense attention window by window."""
    folder, names = output / f"{chip}-{which}-windows", ["windowed", "flash_tpu"]
    found = profile_attention(
        TOPOLOGY[chip], lengths, ["windows"], names, PASSES[which], 1, **VISION, cells=folder / "cells", say=_say
    )
    write_attention(found, folder)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> None:
    """Make what is asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/attention"))
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGY, default=list(TOPOLOGY))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[*LENGTHS, *LONG])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--towers", nargs="+", choices=("text", "vision"), default=["text", "vision"])
    asked = parser.parse_args()
    for chip in asked.chips:
        for which in asked.passes:
            for rows in asked.rows if "text" in asked.towers else []:
                lengths = asked.lengths if rows == 1 else [4096] if which == "backward" else []
                if lengths:
                    text_tower(chip, which, rows, lengths, asked.output)
            if "vision" in asked.towers:
                vision_tower(chip, which, [length for length in asked.lengths if length <= 4096], asked.output)


if __name__ == "__main__":
    main()
