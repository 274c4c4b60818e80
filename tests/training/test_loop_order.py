"""What the loop reads from the device, and when: the metrics of the step before, and nothing else.

A transfer guard sees no copy from a CPU device to its host. So here the step hands out arrays that write down when
anything at all is asked of them.
"""

import json
from collections.abc import Callable

import jax
import numpy as np
import pytest

from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.training import loop
from cocoa_jax.training.state import TrainState

STEPS, EVERY = 6, 4
READS = ("array", "float", "int", "bool", "index", "complex", "iter", "len", "getitem", "format", "jax_array")
OPERATORS = ("add", "radd", "sub", "mul", "rmul", "truediv", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge")


class Watched:
    """An array that tells what is asked of it; only a step, and what saves a state, may look inside."""

    def __init__(self, array: object, tell: Callable[[], None]):
        self._array, self._tell = array, tell

    def __getattr__(self, name: str) -> object:
        self._tell()
        return getattr(self._array, name)

    def __repr__(self) -> str:
        self._tell()
        return repr(self._array)

    __hash__ = None


def _asked(name: str) -> Callable[..., object]:
    def ask(self: Watched, *arguments: object) -> object:
        self._tell()
        if name == "__array__":
            return np.asarray(self._array, *arguments)
        return getattr(self._array, name)(*arguments)

    return ask


for word in READS + OPERATORS:
    setattr(Watched, f"__{word}__", _asked(f"__{word}__"))


def watched(tree: object, tell: Callable[[], None]) -> object:
    return jax.tree.map(lambda leaf: Watched(leaf, tell), tree)


def inside(tree: object) -> object:
    return jax.tree.map(lambda leaf: leaf._array if isinstance(leaf, Watched) else leaf, tree)


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What a run does, in order; the step trains nothing and its metrics say which step they are of."""
    told: list[str] = []

    def tell(what: str) -> Callable[[], None]:
        return lambda: told.append(what) if told[-1:] != [what] else None

    def make_step(*parts: object) -> Callable[..., object]:
        number = iter(range(STEPS))

        def step(state, batch):
            k, state = next(number), inside(state)
            told.append(f"step {k}")
            state = TrainState(state.step + 1, state.params, state.optimizer)
            metrics = {name: np.float32(k + 1) for name in ("loss", "gradient_norm", "masked_tokens")}
            return watched(state, tell(f"read state {k}")), watched(metrics, tell(f"read metrics {k}"))

        return step

    def exchanged(state):
        told.append("save")
        return inside(state)

    monkeypatch.setattr(loop, "make_step", make_step)
    first = loop.exchanged
    monkeypatch.setattr(loop, "exchanged", lambda state: exchanged(state) if told else first(state))
    return told


def test_between_two_steps_only_the_metrics_of_the_step_before_are_read(events, backbone, stage_settings, tmp_path):
    settings = stage_settings("bridge", backbone, tmp_path / "run")
    settings["loop"] = {"steps": STEPS, "checkpoint_every": EVERY}
    folder = loop.train(parse(TrainConfig, settings))
    assert events == [
        "step 0",
        "step 1",  # dispatched before anything of step 0 is waited for
        "read metrics 0",
        "step 2",
        "read metrics 1",
        "step 3",
        "read metrics 2",
        "read metrics 3",  # a state is saved once its own loss is known to be a number
        "save",
        "step 4",
        "step 5",
        "read metrics 4",
        "read metrics 5",
        "save",
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(k, k + 1.0) for k in range(STEPS)]


@pytest.mark.parametrize(
    "ask",
    [float, int, bool, np.asarray, jax.device_get, jax.block_until_ready, "{:.3f}".format, lambda x: x.item(), str],
    ids=["float", "int", "bool", "numpy", "device_get", "block", "format", "item", "str"],
)
def test_whatever_reads_an_array_is_seen(ask):
    seen = []
    ask(Watched(jax.numpy.float32(2.0), lambda: seen.append(1)))
    assert seen
