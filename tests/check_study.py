"""What the page of a finished small study must hold: `python tests/check_study.py DOCS`; used by .ci/run."""

import re
import sys
from pathlib import Path

from cocoa_jax.study.design import load_study, pieces
from cocoa_jax.study.pieces import read_results

INTERVAL = r"[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d"


def main(docs: Path) -> None:
    """Exit with a message when a question, a chance level, an interval or a piece is missing, or a piece is stale."""
    study, text = load_study("pictures-small"), (docs / "results.md").read_text()
    rates, *questions = re.split(r"^### ", text.split("### The learning rates")[1], flags=re.MULTILINE)
    found = {part.splitlines()[0]: part for part in questions}
    wanted = [question.about for question in study.questions.values()]
    assert [*found] == [*wanted, "Task by task"], f"sections {[*found]}, expected {wanted}"
    assert "\n| chance | " in rates, "no chance beside the learning rates"
    for about in wanted:
        assert "\n| chance | " in found[about], f"{about}: no chance"
        assert re.search(INTERVAL, found[about]), f"{about}: no interval"
        assert "Not all of its" not in found[about], f"{about}: seeds are missing"
    assert "; 0 are stale." in text, "pieces are stale"
    missing = {piece.name for piece in pieces(study)} - read_results(docs / "study").keys()
    assert not missing, f"pieces {sorted(missing)} are missing"
    sys.stdout.write(f"{len(wanted)} questions, each with chance and intervals\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
