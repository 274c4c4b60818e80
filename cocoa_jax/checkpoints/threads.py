"""Work on large host arrays spread over the cores: numpy lets go of the interpreter while it copies or adds."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

_MOST = 8  # threads: memory is busy before so many cores are


def spread(work: Callable[[int, int], Result], size: int, step: int) -> list[Result]:
    """``work(start, end)`` of parts that make up ``range(size)``, their results in order.

    Args:
        step: parts begin at multiples of it; what fits in one is done right here.
    """
    threads = min(os.cpu_count() or 1, _MOST, -(-size // step))
    if threads <= 1:
        return [work(0, size)]
    part = -(-size // (threads * step)) * step
    starts = range(0, size, part)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, starts, [min(start + part, size) for start in starts]))
