"""Run in a process of its own by ``cells``: one measurement, its answer as a JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(spec: dict[str, Any], dump: Path, answer: Path) -> None:
    """Measure ``spec``; libtpu dumps into ``dump``, which its environment has told it already."""
    if spec["program"] == "attention":
        from cocoa_jax.profiling.attention_model import model_cell

        result = model_cell(spec, dump)
    else:
        from cocoa_jax.profiling.step_cost import model_step

        result = model_step(spec, dump)
    answer.write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
