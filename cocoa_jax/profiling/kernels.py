"""The attention implementations that can be profiled, and what their kernels do under a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cocoa_jax.attention.spans import Spans
from cocoa_jax.attention.tiles import Blocks, count_tiles, query_hulls
from cocoa_jax.profiling.chips import Chip
from cocoa_jax.profiling.llo import GridCounts
from cocoa_jax.profiling.masks import mask_spans
from cocoa_jax.profiling.model import KernelTable, KernelWork


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


def flash_candidates(problem: Problem, chip: Chip | None) -> list[Candidate]:
    """The project's own TPU kernel at the block sizes of its table."""
    from cocoa_jax.attention import flash_tpu

    kind = chip.kind if chip else jax.devices()[0].device_kind
    calls = span_calls(problem.spans, problem.heads, problem.kv_heads, problem.width, kind, chip.cores if chip else 1)
    forward, scale = calls["span_attention_forward"], problem.width**-0.5
    function = with_gradient(lambda q, k, v, s: flash_tpu.attend(q, k, v, s, scale), problem.backward)
    tiles = count_tiles(problem.spans, problem.length, forward.blocks)
    text = f"{forward.blocks.query}x{forward.blocks.key}, {forward.heads // forward.groups} heads"
    work = {name: call.work() for name, call in calls.items()}
    return [Candidate(text, tiles.visited, tiles.total, tiles.masked, function, work)]


def span_calls(spans: Spans, heads: int, kv_heads: int, width: int, kind: str, cores: int) -> dict[str, SpanCall]:
    """The kernels of one call of ``flash_tpu.attend``, forward and backward, by name.

    Args:
        spans: concrete, [B, T]; as many keys as queries.
        kind: JAX's ``device_kind``, which the block sizes depend on.
        cores: TensorCores of the device.
    """
    from cocoa_jax.attention import flash_tpu_blocks

    T = spans.start.shape[1]
    sizes = flash_tpu_blocks.tuning(kind, width, T)
    groups = heads // flash_tpu_blocks.heads_per_tile(heads // kv_heads, sizes.heads)
    shared = cores if groups % cores == 0 else 1  # the head groups are the parallel axis of the grid
    return {
        f"span_attention_{phase}": SpanCall(
            spans, heads, width, flash_tpu_blocks.fit(blocks, T, T), groups, phase == "backward", shared
        )
        for phase, blocks in (("forward", sizes.forward), ("backward", sizes.backward))
    }


@dataclasses.dataclass(frozen=True)
class SpanCall:
    """One call of a span kernel: a grid of head groups by active tiles, listed query block by query block.

    Args:
        spans: concrete, [B, T].
        groups: head groups, each of which walks the whole list.
        backward: five matrix products a tile, and gradients of keys and values that stay in vector memory for a row.
        cores: TensorCores that share the groups.
    """

    spans: Spans
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
        hulls = query_hulls(self.spans, T, blocks)
        tiles = count_tiles(self.spans, T, blocks)
        steps = float(np.maximum(hulls.hi - hulls.lo, 1).sum() * G)
        row_ends, block_ends = float(B * G), float(B * blocks.grid(T, T)[0] * G)
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
        kept = 2 * B * T * G * H * 4 if self.backward else 0  # dk and dv in float32, one for each head group
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
            (self.spans.start.shape[1] * width * 4, row_ends),
        ):
            found[size] = max(runs, found.get(size, 0.0))
        return found
