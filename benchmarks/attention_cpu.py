"""Attention on a CPU: torch's SDPA with a boolean mask, the dense reference and visible tiles; a Markdown table.

    python benchmarks/attention_cpu.py --lengths 512 1024 4096

All sides take turns in one process on the same two cores, so that noise hits them alike; medians. float32, one row.
``--clock cpu`` counts the processor time of the process instead, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cocoa_jax.attention import blockwise, reference
from cocoa_jax.attention.spans import Spans, bidirectional, segments, truncated
from cocoa_jax.attention.tiles import count_tiles

THREADS = 2
PACKED = (1100, 700, 1300, 996)  # lengths of four documents, of 4096
IMPLEMENTATIONS = {"reference": reference.attend, "blockwise": blockwise.attend}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Run = Callable[[], object]


def masks(length: int) -> dict[str, Spans]:
    """The three masks, spans [T]; a bridge stands at three quarters of every truncated document."""

    def documents(lengths: tuple[int, ...]) -> Spans:
        segment = segments(lengths, length)
        bridge = segment.start + (segment.end - segment.start) * 3 // 4
        return truncated(segment, Spans(bridge, bridge + 1))

    packed = documents(tuple(size * length // 4096 for size in PACKED))
    return {
        "four packed truncated documents": packed,
        "one truncated document": documents((length,)),
        "full": bidirectional(segments([length], length)),
    }


def ours(attend: Callable[..., jax.Array], arrays: list[np.ndarray], spans: Spans) -> tuple[Run, Run, float]:
    """Forward, forward and backward, and the temporary memory of the latter in MiB."""
    q, k, v, weights = (jnp.asarray(x) for x in arrays)
    bounds = Spans(jnp.asarray(spans.start)[None], jnp.asarray(spans.end)[None])
    forward, both = _programs(attend, q.shape)
    memory = both.memory_analysis().temp_size_in_bytes / 2**20
    return (
        lambda: jax.block_until_ready(forward(q, k, v, bounds)),
        lambda: jax.block_until_ready(both(q, k, v, bounds, weights)),
        memory,
    )


@functools.cache
def _programs(attend: Callable[..., jax.Array], shape: tuple[int, ...]) -> tuple[jax.stages.Compiled, ...]:
    x, bound = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    scale = shape[-1] ** -0.5

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
        return attend(q, k, v, spans, scale)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, weights: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, spans, scale), q, k, v)
        return out, *pull(weights)

    spans = Spans(bound, bound)
    return jax.jit(forward).lower(x, x, x, spans).compile(), jax.jit(both).lower(x, x, x, spans, x).compile()


def torchs(arrays: list[np.ndarray], spans: Spans) -> tuple[Run, Run]:
    """The same two runs by torch: [1, N, T, H] and a mask [T, T] that its heads share."""
    tensors = [torch.tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in arrays]
    *qkv, weights = tensors
    mask = torch.tensor(spans.as_mask(arrays[0].shape[1]))[None, None]

    def sdpa() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask)

    def forward() -> None:
        with torch.no_grad():
            sdpa()

    def both() -> None:
        for x in qkv:
            x.requires_grad_().grad = None
        sdpa().backward(weights)

    return forward, both


def measure(runs: dict[str, tuple[Run, Run]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Medians of forward and of both passes in ms, by name; the first turn is not counted."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for turn in range(repeats + 1):
        for which in (0, 1):
            for name, pair in runs.items():
                for _ in range(2):  # the first wakes this side's threads, while those of the side before still spin
                    begin = clock()
                    pair[which]()
                if turn:
                    times[name][which].append((clock() - begin) * 1e3)
    return {name: [statistics.median(found) for found in pair] for name, pair in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--sides", nargs="+", choices=sorted(IMPLEMENTATIONS), default=sorted(IMPLEMENTATIONS))
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # before JAX makes its threads
    torch.set_num_threads(THREADS)
    print(f"Medians of {options.repeats}, {options.clock} clock, {THREADS} threads; {options.heads} heads of ", end="")
    print(f"{options.width}, float32; ms forward / forward+backward, and how many times faster than torch.\n")
    print("| T | mask | visited tiles | torch SDPA | " + " | ".join(options.sides) + " | temporary MiB |")
    print("|---|---|---|---|" + "---|" * (len(options.sides) + 1))
    rng = np.random.default_rng(0)
    for length in options.lengths:
        shape = (1, length, options.heads, options.width)
        arrays = [rng.standard_normal(shape).astype(np.float32) for _ in range(4)]
        blocks = blockwise.cut_for(length, length, options.heads, options.heads).blocks
        for name, spans in masks(length).items():
            sides = {side: ours(IMPLEMENTATIONS[side], arrays, spans) for side in options.sides}
            runs = {"torch": torchs(arrays, spans)} | {side: found[:2] for side, found in sides.items()}
            times = measure(runs, options.repeats, CLOCKS[options.clock])
            base = times["torch"]
            cells = [
                f"{a:.1f} / {b:.1f} ({base[0] / a:.2f}x / {base[1] / b:.2f}x)"
                for a, b in (times[side] for side in options.sides)
            ]
            tiles = count_tiles(Spans(spans.start[None], spans.end[None]), length, blocks)
            memory = ", ".join(f"{side} {found[2]:.0f}" for side, found in sides.items())
            row = [length, name, f"{tiles.visited} of {tiles.total}", f"{base[0]:.1f} / {base[1]:.1f}", *cells, memory]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
