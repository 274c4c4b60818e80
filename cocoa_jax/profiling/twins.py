"""Operations of a module that are the same code: the compiler builds it once, and dumps it under one of their names."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from cocoa_jax.profiling.hlo import Module, Op

# What says nothing of the code: names, places in the source, and the compiler's own notes.
_NOTES = re.compile(r", (?:metadata|backend_config|frontend_attributes)=\{.*")
_OWN = re.compile(r", channel_id=\d+|, control-predecessors=\{[^}]*\}|%[\w.\-]+")


class Twins:
    """The dumps of a module's operations.

    Args:
        module: as compiled.
        files: dumps by the name of an operation.
    """

    def __init__(self, module: Module, files: Mapping[str, Path]):
        self._module, self._files = module, files
        self._body = functools.cache(self._body_of)

    def dump(self, where: str, op: Op) -> Path | None:
        """The dump of an operation, or of one that is the same code; None where the compiler dumped neither."""
        return self._files.get(op.name) or self._by_code.get(self._code(where, op))

    @functools.cached_property
    def _by_code(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for where, ops in self._module.computations.items():
            for op in ops:
                if op.name in self._files:
                    found.setdefault(self._code(where, op), self._files[op.name])
        return found

    def _code(self, where: str, op: Op) -> str:
        """Kind, shapes with their layouts, attributes and the bodies of what is called."""
        shapes = [self._module.shapes.get((where, name), "") for name in op.operands]
        bodies = [self._body(name) for name in op.called]
        return repr((op.kind, op.shape, shapes, _attributes(op), bodies))

    def _body_of(self, where: str) -> int:
        """One number for what a computation gives, whatever the names in it and the order in which it is written."""
        values: dict[str, int] = {}
        root = 0
        for op in self._module.computations.get(where, []):  # operands come first
            own = op.raw_operands if op.kind in ("parameter", "constant") else ""
            values[op.name] = hash((self._code(where, op), own, *(values[name] for name in op.operands)))
            root = values[op.name] if op.root else root
        return root


def _attributes(op: Op) -> str:
    return _OWN.sub("", _NOTES.sub("", op.rest))
