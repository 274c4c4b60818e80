"""Worker processes of a build."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from cocoa_jax.data.prepare_shard import Part, Work, write_shard

_TOLD_EVERY = 20  # records between two words of a worker about its progress


def run_shards(work: Work, shards: int, todo: Sequence[int], workers: int) -> Iterator[int | Part]:
    """Write the shards ``todo`` of ``shards``; gives numbers of records as they are done, and the part of each shard.

    Raises:
        RuntimeError: a worker died; whatever a worker raised.
    """
    if not workers:
        for shard in todo:
            seen: list[int] = []
            part = write_shard(work, shard, shards, seen.append)
            yield len(seen)
            yield part
        return
    # Spawned, not forked: threads of the parent (JAX has some) hold locks that a fork would inherit.
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for task in (*todo, *[None] * workers):
        tasks.put(task)
    processes = [
        context.Process(target=_serve, args=(work, shards, tasks, results), daemon=True)
        for _ in range(min(workers, len(todo)))
    ]
    for process in processes:
        process.start()
    left = len(todo)
    try:
        while left:
            try:
                done = results.get(timeout=1)
            except queue.Empty:
                dead = [process.exitcode for process in processes if process.exitcode]
                if dead:
                    raise RuntimeError(
                        f"a worker ended with status {dead[0]}: run again to go on, with more memory"
                    ) from None
                continue
            if isinstance(done, BaseException):
                raise done
            left -= isinstance(done, Part)
            yield done
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve(work: Work, shards: int, tasks: Any, results: Any) -> None:
    """A worker: takes shards until there are none."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pending = 0

    def note(count: int) -> None:
        nonlocal pending
        pending += count
        if pending >= _TOLD_EVERY:
            results.put(pending)
            pending = 0

    try:
        while (shard := tasks.get()) is not None:
            part = write_shard(work, shard, shards, note)
            results.put(pending)
            pending = 0
            results.put(part)
    except Exception as error:
        results.put(error)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
