"""Measurements in processes of their own, each kept in a file so that a long series can be stopped and continued."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa_jax.profiling.llo import FLAGS
from cocoa_jax.profiling.topology import ENVIRONMENT, parse_topology

Spec = Mapping[str, Any]
"""What to measure, as plain JSON values; ``program`` names the measurement in ``worker.py``."""

_PACKAGE = Path(__file__).parents[1]
_MODEL = tuple(
    f"profiling/{name}.py" for name in ("attention_model", "hlo", "kernels", "llo", "masks", "model", "twins")
)
_DENSE = ("attention/reference.py", "attention/spans.py")
_STEP = (
    *("attention/*.py", "models/*.py", "objectives/*.py", "chips.py"),
    *(
        f"training/{name}.py"
        for name in ("accumulation", "average", "gradients", "mesh", "optimizer", "sharding", "stages", "state", "step")
    ),
    *(
        f"profiling/{name}.py"
        for name in (
            "collectives",
            "hlo",
            "kernels",
            "llo",
            "masks",
            "model",
            "plan",
            "step_cost",
            "steps",
            "topology",
            "twins",
        )
    ),
)
_READ = {  # the code that a measurement depends on, by program and implementation
    "attention reference": (*_DENSE, *_MODEL),
    "attention windowed": (*_DENSE, *_MODEL),
    "attention splash": ("profiling/splash.py", *_MODEL),
    "attention flash_tpu": ("attention/flash_tpu*.py", "attention/spans.py", "attention/tiles.py", *_MODEL),
    "plan": _STEP,
    "step": _STEP,
}


class MeasurementError(RuntimeError):
    """A measurement that failed; the message is the last line of what its process said."""


class Cells:
    """Measurements by what was measured, with what, and with which code; none is made twice.

    Args:
        folder: where they are kept for the next command; None keeps them for this one alone.
    """

    def __init__(self, folder: str | Path | None):
        self._folder = Path(folder) if folder else None
        self._known: dict[str, dict[str, Any]] = {}

    def get(self, spec: Spec) -> dict[str, Any]:
        """The result for ``spec``: kept from before, or measured now in a process of its own.

        Raises:
            MeasurementError: it cannot be measured.
        """
        name = json.dumps(dict(spec), sort_keys=True)
        if name not in self._known:
            self._known[name] = self._kept_or_measured(spec)
        return self._known[name]

    def _kept_or_measured(self, spec: Spec) -> dict[str, Any]:
        versions = versions_of(spec)
        path = self._folder / f"{_slug(spec)}.json" if self._folder else None
        if path and path.is_file():
            kept = json.loads(path.read_text())
            if kept["spec"] == dict(spec) and kept["versions"] == versions:
                return kept["result"]
        result = _measure(spec)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial")
            text = json.dumps({"spec": dict(spec), "versions": versions, "result": result}, indent=1)
            aside.write_text(text + "\n")
            os.replace(aside, path)
        return result


def _measure(spec: Spec) -> dict[str, Any]:
    """libtpu reads where to dump once, when it is loaded: hence a process for each measurement."""
    with tempfile.TemporaryDirectory(prefix="cocoa-profile-") as folder:
        dump, answer = Path(folder, "dump"), Path(folder, "answer.json")
        dump.mkdir()
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "LIBTPU_INIT_ARGS": FLAGS.format(folder=dump),
            "PYTHONPATH": os.pathsep.join([str(_PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "cocoa_jax.profiling.worker", json.dumps(dict(spec)), str(dump), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not answer.is_file():
            raise MeasurementError(f"{_slug(spec)}: {_reason(done.stderr)}")
        return json.loads(answer.read_text())


def _reason(said: str) -> str:
    """The line that names the error, without JAX's frames around it."""
    lines = [
        line.strip() for line in said.splitlines() if line.strip() and not line.startswith((" ", "---", "W0", "E0"))
    ]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b.*:", line)]
    return (named or lines or ["the process died without a word"])[-1]


def versions_of(spec: Spec) -> dict[str, str]:
    """Of the compiler, and a digest of the code that a measurement depends on: where one differs, it is made again."""
    digest = hashlib.sha256()
    words = [str(spec[key]) for key in ("program", "implementation") if key in spec]
    chip = parse_topology(spec["topology"])[0]
    digest.update(repr((chip.peak_flops, chip.flops_per_cycle, chip.cores, chip.hbm_bandwidth)).encode())
    for pattern in _READ[" ".join(words)]:
        for path in sorted(_PACKAGE.glob(pattern)):
            digest.update(_computed(path.read_text()).encode())
    found = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {**found, "code": digest.hexdigest()[:12]}


class _Computed(ast.NodeTransformer):
    """Takes out of code what changes no figure: docstrings, and where names are imported from."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


def _computed(code: str) -> str:
    """Code without comments, layout, docstrings and imports: a cell need not be made again because of them."""
    return ast.unparse(_Computed().visit(ast.parse(code)))


def _slug(spec: Spec) -> str:
    words = [str(value).lower() if not isinstance(value, dict) else _short(value) for value in spec.values()]
    return re.sub(r"[^\w.=-]+", "-", "_".join(words))


def _short(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
