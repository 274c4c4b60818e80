"""Precision@1 of several finished demo runs side by side, as a Markdown table.

for seed in 0 1 2; do cocoa demo --output runs/seed$seed --seed $seed; done
python benchmarks/demo_seeds.py runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from cocoa_jax.evaluation.run import read_results


def table(folders: Sequence[str]) -> str:
    """One line a task: every run, their mean, and beside it the chance level and the mean untrained score, in %."""
    runs = [read_results(folder)["tasks"] for folder in folders]
    head = ["task", "queries", "of", *folders, "mean", "chance", "untrained"]
    rows = []
    for name, task in runs[0].items():
        scores = [run[name]["p_at_1"] for run in runs]
        untrained = np.mean([run[name]["untrained_p_at_1"] for run in runs])
        rows.append((task["queries"], task["candidates"], name, [*scores, np.mean(scores), task["chance"], untrained]))
    means = np.mean([values for *_, values in rows], axis=0)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for queries, candidates, name, values in [*rows, ("", "", "mean of the tasks", means)]:
        lines.append(f"| {name} | {queries} | {candidates} | {' | '.join(f'{100 * v:.1f}' for v in values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="outputs of `cocoa demo`")
    sys.stdout.write(table(parser.parse_args().folders) + "\n")
