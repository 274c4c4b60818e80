"""Floors under a finished demo: `python tests/check_demo.py FOLDER`; used by .ci/run after the small scale."""

import json
import sys
from pathlib import Path

import numpy as np


def main(folder: Path) -> None:
    """Exit with a message when a file is missing or the scores are not above chance and the untrained model."""
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    keys = ("p_at_1", "chance", "untrained_p_at_1")
    mean = {key: float(np.mean([task[key] for task in tasks.values()])) for key in keys}
    sys.stdout.write(", ".join(f"mean {key} {mean[key]:.4f}" for key in keys) + "\n")
    assert len(tasks) >= 8, f"{len(tasks)} tasks, expected at least 8"
    assert {task["meta_task"] for task in tasks.values()} == {"classification", "vqa", "retrieval", "grounding"}
    assert mean["p_at_1"] >= 3 * mean["chance"], "mean p@1 is below three times chance"
    assert mean["p_at_1"] > mean["untrained_p_at_1"], "mean p@1 is not above the untrained model's"
    page = (folder / "report.html").read_text()
    assert "<html" in page and "</html>" in page, "report.html is not whole"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
