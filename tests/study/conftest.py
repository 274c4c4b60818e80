"""Pieces made by hand, and a study of two recipes."""

from collections.abc import Callable

import numpy as np
import pytest

from cocoa_jax.study.design import Arm, Question, Study
from cocoa_jax.study.pieces import Result, TaskHits


@pytest.fixture
def study() -> Study:
    """Two recipes that share no stage but the last one's kind, two seeds, a longer arm, and one that is cut."""
    return Study(
        backbone={"width": 96, "layers": 1, "heads": 2},
        stages={"3-contrastive": {"loop": {"steps": 10}}, "2-bridge": {"loop": {"steps": 5}}},
        rates=(1e-3, 2e-3),
        arms={
            "bare": Arm("bidirectional", "bare"),
            "cocoa": Arm("cocoa", "all three"),
            "longer": Arm("bidirectional", "longer", compute="cocoa"),
            "cut": Arm("cocoa", "cut", width=16),
        },
        questions={
            "steps": Question("Equal steps", ("bare", "cocoa"), 2),
            "compute": Question("Equal compute", ("longer", "cocoa"), 2),
            "late": Question("Later", ("cocoa", "cut"), 3, wave=1),
        },
    )


def _made(arm: str, seed: int, rate: float, accuracy: float, search: bool = False, recipe: str = "cocoa") -> Result:
    """A piece whose queries are right with this probability."""
    rng = np.random.default_rng((seed, len(arm)))
    splits = ("validation",) if search else ("test_seen", "test_unseen")
    tasks = {
        f"{name}/{split}": TaskHits(meta, split, 50, 0.02, rng.random(queries) < accuracy)
        for split in splits
        for name, meta, queries in (("caption", "retrieval", 60), ("keyword", "vqa", 37), ("tile", "grounding", 16))
    }
    stage = {"stage": "contrastive", "folder": f"{arm}-{seed}", "steps": 10, "flops": 2e12, "seconds": 4.0}
    return Result(arm, recipe, seed, rate, search, (stage,), 1.0, "0" * 12, "1" * 12, tasks)


@pytest.fixture
def made() -> Callable[..., Result]:
    """Makes a piece whose queries are right with a given probability."""
    return _made
