"""The attention implementations that can be profiled, and what their kernels do under a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cocoa_jax.attention.spans import Spans
from cocoa_jax.attention.tiles import Blocks, count_tiles, query_hulls
from cocoa_jax.chips import Chip
from cocoa_jax.profiling.llo import GridCounts
from cocoa_jax.profiling.masks import WINDOW, mask_spans
from cocoa_jax.profiling.model import KernelTable, KernelWork, ModelError


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of attention; T is ``length`` for queries and keys alike, bfloat16."""

    mask: str
    length: int
    backward: bool
    rows: int = 1
    heads: int = 12
    kv_heads: int = 2
    width: int = 128

    @property
    def spans(self) -> Spans:
        """What each token sees, [rows, length]."""
        return mask_spans(self.mask, self.length, self.rows)

    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k, v, start, end, and the gradient of the output."""
        B, T, H = self.rows, self.length, self.width
        q, k = (jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (self.heads, self.kv_heads))
        bound = jax.ShapeDtypeStruct((B, T), jnp.int32)
        return q, k, k, bound, bound, q


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A program to compile and what its kernels do.

    Args:
        blocks: its block sizes in words; empty where it has none.
        visited, total, masked: tiles of one head, all rows together; masked ones are among the visited.
        function: of ``Problem.arrays()``: the output, and the gradients of q, k and v if asked for.
        work: of its kernels by name; empty where it has none.
    """

    blocks: str
    visited: int
    total: int
    masked: int
    function: Callable[..., Any]
    work: KernelTable


Attend = Callable[[Array, Array, Array, Spans], Array]


def with_gradient(attend: Attend, backward: bool) -> Callable[..., Any]:
    """``attend`` as a function of plain arrays, and with its gradients if asked for."""

    def run(q: Array, k: Array, v: Array, start: Array, end: Array, gradient: Array) -> Any:
        if not backward:
            return attend(q, k, v, Spans(start, end))
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, Spans(start, end)), q, k, v)
        return out, pull(gradient)

    return run


def reference_candidates(problem: Problem, chip: Chip | None) -> list[Candidate]:
    """Dense attention: every score, one tile."""
    from cocoa_jax.attention import reference

    scale = problem.width**-0.5
    function = with_gradient(lambda q, k, v, s: reference.attend(q, k, v, s, scale), problem.backward)
    return [Candidate("", problem.rows, problem.rows, problem.rows, function, {})]


def blockwise_candidates(problem: Problem, chip: Chip | None) -> list[Candidate]:
    """The loop over active tiles in plain JAX; its loops are as long as the data say, so it can only be measured."""
    from cocoa_jax.attention.api import attend

    scale = problem.width**-0.5

    def call(q: Array, k: Array, v: Array, spans: Spans) -> Array:
        return attend(q, k, v, spans, scale=scale, implementation="blockwise")

    return [Candidate("", 0, 0, 0, with_gradient(call, problem.backward), {})]


def windowed_candidates(problem: Problem, chip: Chip | None) -> list[Candidate]:
    """Dense attention window by window, the windows as rows: what a second path for whole windows would do.

    Raises:
        ValueError: other masks than ``windows``, or a row that is not made of whole windows.
    """
    from cocoa_jax.attention import reference

    if problem.mask != "windows" or problem.length % WINDOW:
        raise ValueError(
            f"dense windows under mask {problem.mask!r} at {problem.length}: ask for mask windows and a multiple of "
            f"{WINDOW}"
        )

    def call(q: Array, k: Array, v: Array, spans: Spans) -> Array:
        q_own, k_own, v_own = (x.reshape(-1, WINDOW, *x.shape[2:]) for x in (q, k, v))
        first, last = (x.reshape(-1, WINDOW) % WINDOW for x in (spans.start, spans.end - 1))
        return reference.attend(q_own, k_own, v_own, Spans(first, last + 1), problem.width**-0.5).reshape(q.shape)

    windows = problem.rows * problem.length // WINDOW
    return [Candidate("", windows, windows, 0, with_gradient(call, problem.backward), {})]


def flash_candidates(problem: Problem, chip: Chip | None) -> list[Candidate]:
    """The project's own TPU kernel at the block sizes of its table."""
    from cocoa_jax.attention import flash_tpu

    kind = chip.kind if chip else jax.devices()[0].device_kind
    calls = span_calls(problem.spans, problem.heads, problem.kv_heads, problem.width, kind, chip.cores if chip else 1)
    forward, scale = calls["span_attention_forward"][0], problem.width**-0.5
    function = with_gradient(lambda q, k, v, s: flash_tpu.attend(q, k, v, s, scale), problem.backward)
    tiles = count_tiles(problem.spans, problem.length, forward.blocks)
    text = f"{forward.blocks.query}x{forward.blocks.key}, {forward.heads // forward.groups} heads"
    if problem.backward:
        backward = calls["span_attention_backward"][0].blocks
        text += f"; backward {backward.query}x{backward.key}"
    if not problem.backward:
        del calls["span_attention_backward"]
    work = {name: mean_work(some) for name, some in calls.items()}
    return [Candidate(text, tiles.visited, tiles.total, tiles.masked, function, work)]


def span_calls(spans: Spans, heads: int, kv_heads: int, width: int, kind: str, cores: int) -> dict[str, list[SpanCall]]:
    """The kernels of one ``flash_tpu.attend``, forward and backward, by name: the calls that a pass is cut into.

    Args:
        spans: concrete, [B, T]; as many keys as queries.
        kind: JAX's ``device_kind``, which the block sizes depend on.
        cores: TensorCores of the device.
    """
    from cocoa_jax.attention import flash_tpu_blocks, flash_tpu_tiles

    B, T = spans.start.shape
    sizes = flash_tpu_blocks.tuning(kind, width, T)
    groups = heads // flash_tpu_blocks.heads_per_tile(heads // kv_heads, sizes.heads)
    shared = cores if groups % cores == 0 else 1  # the head groups are the parallel axis of the grid
    blocks = flash_tpu_blocks.fit(sizes.forward, T, T)
    part = flash_tpu_tiles.queries_per_call(B, T, T, blocks)
    own = [Spans(spans.start[:, at : at + part], spans.end[:, at : at + part]) for at in range(0, T, part)]
    forward = [SpanCall(some, T, heads, width, blocks, groups, False, shared) for some in own]
    blocks = flash_tpu_blocks.fit(sizes.backward, T, T)
    part = flash_tpu_tiles.keys_per_call(B, T, T, blocks, flash_tpu_blocks.device(kind).keys)
    ends = [(at, min(at + part, T)) for at in range(0, T, part)]
    backward = [SpanCall(spans.within(at, to), to - at, heads, width, blocks, groups, True, shared) for at, to in ends]
    return {"span_attention_forward": forward, "span_attention_backward": backward}


def mean_work(calls: Sequence[SpanCall]) -> KernelWork:
    """What each of the calls of a pass does on average: times their number, what all of them do.

    Raises:
        ModelError: calls of unequal length, whose programs differ.
    """
    sizes = [(call.spans.start.shape[1], call.keys) for call in calls]
    if len(set(sizes)) > 1:
        raise ModelError(
            f"a row of {max(sizes[0])} tokens is done in {len(calls)} calls, the first of {sizes[0]} queries and keys, "
            f"the last of {sizes[-1]}: choose a length that is a multiple of {min(sizes[0])}"
        )
    works = [call.work() for call in calls]

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(works)

    def means(runs: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(map(mean, zip(*runs, strict=True)))

    counts = GridCounts(
        steps=mean(work.counts.steps for work in works),
        begin=means(work.counts.begin for work in works),
        compute=means(work.counts.compute for work in works),
        finish=means(work.counts.finish for work in works),
        copies={size: mean(work.counts.copies[size] for work in works) for size in works[0].counts.copies},
        cores=works[0].counts.cores,
    )
    return KernelWork(counts, mean(work.flops for work in works), mean(work.bytes for work in works))


@dataclasses.dataclass(frozen=True)
class SpanCall:
    """One call of a span kernel: a grid of head groups by active tiles, listed query block by query block.

    Args:
        spans: concrete, [B, T].
        keys: S.
        groups: head groups, each of which walks the whole list.
        backward: five matrix products a tile, and gradients of keys and values that stay in vector memory for a row.
        cores: TensorCores that share the groups.
    """

    spans: Spans
    keys: int
    heads: int
    width: int
    blocks: Blocks
    groups: int
    backward: bool
    cores: int

    def work(self) -> KernelWork:
        """What it does on these spans."""
        B, T = self.spans.start.shape
        H, G, blocks = self.width, self.groups, self.blocks
        hulls = query_hulls(self.spans, self.keys, blocks)
        tiles = count_tiles(self.spans, self.keys, blocks)
        steps = float(np.maximum(hulls.hi - hulls.lo, 1).sum() * G)
        row_ends, block_ends = float(B * G), float(B * blocks.grid(T, self.keys)[0] * G)
        counts = GridCounts(
            steps=steps,
            begin=(row_ends, block_ends),
            compute=(float((tiles.visited - tiles.masked) * G), float(tiles.masked * G)),
            finish=(block_ends, row_ends) if self.backward else (block_ends,),
            copies=self._copies(steps, block_ends, row_ends),
            cores=self.cores,
        )
        area = float(tiles.visited * self.heads * blocks.query * blocks.key)
        once = (4 if self.backward else 2) * B * T * self.heads * H * 2  # q and dout in, dq and the output out
        kept = 2 * B * self.keys * G * H * 4 if self.backward else 0  # dk and dv in float32, one for each head group
        fetched = 2 * steps * blocks.key * H * 2  # keys and values of every step
        return KernelWork(counts, (10 if self.backward else 4) * area * H, float(once + kept + fetched))

    def _copies(self, steps: float, block_ends: float, row_ends: float) -> dict[int, float]:
        """Runs by size: what belongs to queries changes with their block, keys and values every step."""
        group, blocks, width = self.heads // self.groups, self.blocks, self.width
        found: dict[int, float] = {}
        for size, runs in (
            (group * blocks.query * width * 2, block_ends),
            (-(-2 * group // 8) * 8 * blocks.query * 4, block_ends),  # a number or two for each head and query
            (blocks.key * width * 2, steps),
            (self.keys * width * 4, row_ends),
        ):
            found[size] = max(runs, found.get(size, 0.0))
        return found
