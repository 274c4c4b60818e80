"""The whole matrix of docs/attention.md: chip by pass by length, compiled for TPUs that are not here; one command.

    python benchmarks/attention_matrix.py --output docs/attention

It can be stopped at any time and continued: every cell is a file, made again only where the code that it depends on
has changed. A cell takes seconds to minutes of one core. No figure here is measured.
"""

from __future__ import annotations

import argparse
import json
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
    folder = _folder(output, chip, which, rows)
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


def summary(output: Path) -> str:
    """Times of the kernel and their ratios to splash, one line for each chip, pass and length that is there."""
    head = ["chip", "pass", "rows", "T", "splash, any mask but causal", "splash, causal", *MASKS, "temporary MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for chip in TOPOLOGY:
        for which in PASSES:
            for rows in (1, 4):
                path = _folder(output, chip, which, rows) / "attention.json"
                made = json.loads(path.read_text()) if path.is_file() else []
                for length in sorted({row["length"] for row in made}):
                    found = {(row["implementation"], row["mask"]): row for row in made if row["length"] == length}
                    splash = [f"{found['splash', mask]['seconds'] * 1e3:.3f}" for mask in ("full", "causal")]
                    ours = [found["flash_tpu", mask] for mask in MASKS]
                    times = [f"{row['seconds'] * 1e3:.3f} ({row['to_splash']:.2f})" for row in ours]
                    memory = [row["temporary"] / 2**20 for row in (ours[0], found["splash", "full"])]
                    cells = [chip, which, rows, length, *splash, *times, f"{memory[0]:.1f}, splash {memory[1]:.1f}"]
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def windows(output: Path) -> str:
    """Whole programs under windows, kernels and what stands beside them, by chip, pass and length."""
    lines = ["| chip | pass | T | dense [windows, 64] ms | flash_tpu ms | ratio | temporary MiB |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for chip in TOPOLOGY:
        for which in PASSES:
            path = output / f"{chip}-{which}-windows" / "attention.json"
            made = json.loads(path.read_text()) if path.is_file() else []
            for dense, ours in zip(made[::2], made[1::2], strict=True):
                times = [(row["seconds"] + row["around"]) * 1e3 for row in (dense, ours)]
                memory = ", ".join(f"{row['temporary'] / 2**20:.1f}" for row in (dense, ours))
                cells = [chip, which, ours["length"], *(f"{time:.3f}" for time in times), f"{times[1] / times[0]:.2f}"]
                lines.append("| " + " | ".join(map(str, [*cells, memory])) + " |")
    return "\n".join(lines) + "\n"


def _folder(output: Path, chip: str, which: str, rows: int) -> Path:
    return output / f"{chip}-{which}{f'-{rows}-rows' if rows > 1 else ''}"


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
    text = summary(asked.output) + "\n" + windows(asked.output)
    (asked.output / "summary.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
