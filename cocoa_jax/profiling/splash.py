"""JAX's splash attention as the yardstick, at block sizes to choose the best from; for profiling only.

It always gets the documents as segment ids, which any packed or padded row needs. It skips no tile because of them,
and it cannot express the truncated mask: under ``bridge`` and ``packed-bridge`` it computes the whole square instead.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array

from cocoa_jax.attention.spans import Spans
from cocoa_jax.chips import Chip
from cocoa_jax.profiling.kernels import Candidate, Problem, with_gradient
from cocoa_jax.profiling.llo import GridCounts
from cocoa_jax.profiling.masks import segment_ids
from cocoa_jax.profiling.model import KernelTable, KernelWork


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Block sizes of all of its kernels: queries, keys, keys computed at once; one backward kernel or two."""

    query: int
    key: int
    compute: int
    fused: bool = False


SIZES = (
    Sizes(512, 512, 512),
    Sizes(512, 1024, 512),
    Sizes(512, 1024, 1024),
    Sizes(1024, 1024, 512),
    Sizes(1024, 1024, 1024),
)


def splash_candidates(problem: Problem, chip: Chip | None) -> list[Candidate]:
    """Splash attention at every block size that fits the row, with one backward kernel and with two."""
    found = []
    for sizes in SIZES:
        if sizes.key <= problem.length and sizes.query <= problem.length:
            kinds = (False, True) if problem.backward else (False,)
            found += [_candidate(problem, dataclasses.replace(sizes, fused=fused)) for fused in kinds]
    if not found:
        raise ValueError(f"splash attention at {problem.length} tokens: its blocks start at 512; ask for a longer row")
    return found


def _candidate(problem: Problem, sizes: Sizes) -> Candidate:
    T, N = problem.length, problem.heads
    one = masks.CausalMask((T, T)) if problem.mask == "causal" else masks.FullMask((T, T))
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([one] * N),
        block_sizes=splash.BlockSizes(
            block_q=sizes.query,
            block_kv=sizes.key,
            block_kv_compute=sizes.compute,
            block_q_dkv=sizes.query,
            block_kv_dkv=sizes.key,
            block_kv_dkv_compute=sizes.compute,
            block_q_dq=None if sizes.fused else sizes.query,
            block_kv_dq=None if sizes.fused else sizes.key,
            use_fused_bwd_kernel=sizes.fused,
        ),
    )
    documents = jnp.asarray(segment_ids(problem.mask, T))

    def attend(q: Array, k: Array, v: Array, spans: Spans) -> Array:
        scaled = (q * problem.width**-0.5).astype(q.dtype)
        heads = [x.swapaxes(1, 2) for x in (scaled, k, v)]
        ids = splash.SegmentIds(documents, documents)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(*heads).swapaxes(1, 2)

    visited, total = _active(kernel.fwd_mask_info, T, sizes)[1], (T // sizes.query) * (T // sizes.key)
    text = f"{sizes.query}x{sizes.key}/{sizes.compute}{', fused backward' if sizes.fused else ''}"
    B = problem.rows
    return Candidate(
        text if problem.backward else text.split(",")[0],
        visited * B,
        total * B,
        visited * B,
        with_gradient(attend, problem.backward),
        _work(problem, kernel, sizes),
    )


def _work(problem: Problem, kernel: Any, sizes: Sizes) -> KernelTable:
    """Every grid step fetches its blocks, whether its tile is active or not."""
    T, N, H = problem.length, problem.heads * problem.rows, problem.width
    queries, keys = T // sizes.query, T // sizes.key
    area = sizes.query * sizes.key

    def work(info: Any, ends: float, products: int, fetched: int, once: int) -> KernelWork:
        steps, active = _active(info, T, sizes)
        counts = GridCounts(float(N * steps), (ends,), (float(N * active),), (ends,))
        moved = 2.0 * N * steps * fetched * H + 2.0 * N * T * H * once
        return KernelWork(counts, float(products * N * active * area * H), moved)

    table = {
        # Keys and values of every step; queries and output once.
        "splash_mha_fwd": work(kernel.fwd_mask_info, float(N * queries), 4, 2 * sizes.key, 2),
        # Queries and the output's gradient of every step; the gradients of keys and values once a key head.
        "splash_mha_dkv": work(
            kernel.dkv_mask_info,
            float(problem.kv_heads * problem.rows * keys),
            10 if sizes.fused else 8,
            2 * sizes.query + (sizes.query if sizes.fused else 0),
            2,
        ),
    }
    if not sizes.fused:
        table["splash_mha_dq"] = work(kernel.dq_mask_info, float(N * queries), 6, 2 * sizes.key, 3)
    return table


def _active(info: Any, length: int, sizes: Sizes) -> tuple[int, int]:
    """Grid steps and active tiles of one head: every tile where the kernel has no list of them."""
    if info is None or info.block_mask is None:
        every = (length // sizes.query) * (length // sizes.key)
        return every, every
    table = np.asarray(info.block_mask)[0]
    return int(table.size), int((table > 0).sum())
