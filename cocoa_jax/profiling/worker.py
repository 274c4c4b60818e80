"""Run in a process of its own by ``cells``: one measurement, its answer as a JSON file."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def end_with_parent() -> None:
    """Watch the process that asked, and end with it: a command that is killed leaves no compiler at work."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(spec: dict[str, Any], dump: Path, answer: Path) -> None:
    """Measure ``spec``; libtpu dumps into ``dump``, which its environment has told it already."""
    if spec["program"] == "attention":
        from cocoa_jax.profiling.attention_model import model_cell

        result = model_cell(spec, dump)
    elif spec["program"] == "plan":
        from cocoa_jax.profiling.plan import plan_step

        result = plan_step(spec, dump)
    else:
        from cocoa_jax.profiling.step_cost import model_step

        result = model_step(spec, dump)
    answer.write_text(json.dumps(result))


if __name__ == "__main__":
    end_with_parent()
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
