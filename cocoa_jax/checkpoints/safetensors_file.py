"""Safetensors files written tensor by tensor: the library's own writer wants all of them in memory at once.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SYNC = 2**28  # bytes of a file that wait for the disk at most

Done = Callable[[int], object]  # hears of every number of bytes that is done


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its name, shape and dtype, and ``data``, which makes it in this dtype, contiguous."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    data: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Sequence[Tensor], done: Done) -> None:
    """Write a file of tensors in their order, each of them made while the one before is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        place = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        write = _Writer(file, done)
        pending = None
        for tensor in tensors:
            data = tensor.data().view(np.uint8).data
            if pending is not None:
                pending.result()
            pending = pool.submit(write, data)
        if pending is not None:
            pending.result()


class _Writer:
    """Writes to a file and has the disk take it every now and then, not all at the end."""

    def __init__(self, file: BinaryIO, done: Done):
        self._file, self._done, self._waiting = file, done, 0

    def __call__(self, data: memoryview) -> None:
        self._file.write(data)
        self._waiting += data.nbytes
        if self._waiting > _SYNC:
            self._file.flush()
            os.fdatasync(self._file.fileno())
            self._waiting = 0
        self._done(data.nbytes)
