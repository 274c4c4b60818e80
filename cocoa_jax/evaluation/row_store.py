"""Embeddings on disk by what they are of: what any set embedded, no other set embeds again."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

_STAMP, _DIGESTS, _ROWS, _CODE = "made_with", "digests", "rows", "code"


class RowStore:
    """Files of rows and the digests of what they embed; rows of other weights or settings are not seen.

    Args:
        folder: where the files lie.
        made_with: plain values that name weights and settings.
        code: version of the code, noted beside rows that are saved; those of other versions are seen too.
    """

    def __init__(self, folder: Path, made_with: Mapping[str, Any], code: str):
        self._folder, self._stamp, self._code = folder, json.dumps(made_with, sort_keys=True), code
        self._codes: dict[Path, str] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.npz")):
            self.note(path)

    def known(self, digests: Sequence[str]) -> Float32[np.ndarray, "n W"]:
        """The rows of digests that are all known, in their order.

        Raises:
            KeyError: one is not; see `missing`.
        """
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for out, digest in enumerate(digests):
            path, row = self._places[digest]
            wanted.setdefault(path, []).append((out, row))
        parts = []
        for path, pairs in wanted.items():
            with np.load(path) as file:
                parts.append(file[_ROWS][[row for _, row in pairs]])
        order = np.argsort([out for pairs in wanted.values() for out, _ in pairs])
        return np.concatenate(parts)[order].astype(np.float32)

    def missing(self, digests: Sequence[str]) -> list[int]:
        """The places of digests whose rows are not known."""
        return [place for place, digest in enumerate(digests) if digest not in self._places]

    def codes(self, digests: Sequence[str]) -> list[str]:
        """The versions of the code that made the rows of digests that are all known; "unknown" where none was noted."""
        return sorted({self._codes[path] for path in {self._places[digest][0] for digest in digests}})

    def path_of(self, name: str, digests: Sequence[str]) -> Path:
        """The file for rows of these digests, which set ``name`` brings."""
        return self._folder / f"{name}-{hashlib.blake2b(''.join(digests).encode(), digest_size=4).hexdigest()}.npz"

    def save(self, path: Path, digests: Sequence[str], rows: Float32[np.ndarray, "n W"]) -> None:
        """Writes a file, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        with aside.open("wb") as file:
            stamps = {_STAMP: np.array(self._stamp), _CODE: np.array(self._code)}
            np.savez(file, **stamps, **{_DIGESTS: np.array(digests, "S32"), _ROWS: rows})  # type: ignore[arg-type]
        os.replace(aside, path)

    def note(self, path: Path) -> None:
        """Learns what a file holds."""
        try:
            with np.load(path) as file:
                if str(file[_STAMP]) == self._stamp:
                    self._codes[path] = str(file[_CODE]) if _CODE in file else "unknown"
                    for row, digest in enumerate(file[_DIGESTS]):
                        self._places.setdefault(digest.decode(), (path, row))
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return  # of a killed run, or damaged: its set is embedded anew
