"""``attend``: the one door to attention under spans."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from cocoa_jax.attention import blockwise, reference
from cocoa_jax.attention.divide import divided
from cocoa_jax.attention.spans import Spans

# From so many scores of one row and head on, visiting tiles is no slower than a dense product on a CPU, whatever the
# mask: see benchmarks/attention_cpu.py.
DENSE_SCORES = 512 * 512
_log = logging.getLogger(__name__)


def _flash_tpu(q: Array, k: Array, v: Array, spans: Spans, scale: float) -> Array:
    from cocoa_jax.attention import flash_tpu  # Pallas for TPUs takes long to import and is not wanted elsewhere

    return flash_tpu.attend(q, k, v, spans, scale)


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, Spans, float], Array]] = {
    "reference": reference.attend,
    "blockwise": divided(blockwise.attend),
    "flash_tpu": divided(_flash_tpu),
}
PLATFORMS = {"flash_tpu": ("tpu",)}  # of implementations that do not run everywhere


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spans: Spans,
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention in which query t of row b sees the keys in ``[start[b, t], end[b, t])``.

    Args:
        q: queries, N heads of width H.
        k: keys, K heads; K divides N and every key head serves N / K query heads.
        v: values, K heads.
        spans: int32 [B, T] each.
        scale: multiplies the scores before the softmax.
        implementation: a name from ``IMPLEMENTATIONS``; None takes what ``choose`` says, and logs it once.

    Returns:
        The attended values; a query whose span is empty gives zeros and passes no gradient.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that does not exist or cannot run here.
    """
    _check(q, k, v, spans)
    where = platform()
    if implementation is None:
        implementation = choose(where, q.shape[1], k.shape[1])
        _say(implementation, where, q.shape[1], k.shape[1])
    if implementation not in IMPLEMENTATIONS:
        names = sorted(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation {implementation!r} does not exist: choose one of {names}")
    runs_on = PLATFORMS.get(implementation, (where,))
    if where not in runs_on:
        raise ValueError(
            f"attention implementation {implementation!r} runs on {' and '.join(runs_on)}, this program is for "
            f"{where}: choose {choose(where, q.shape[1], k.shape[1])!r}, or null for the best one"
        )
    return IMPLEMENTATIONS[implementation](q, k, v, spans, scale)


def platform() -> str:
    """The platform that a program is traced for: that of the mesh in use, else that of the default device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if described is None else described.platform


def choose(platform: str, queries: int, keys: int) -> str:
    """The name of the implementation for rows of so many queries and keys on a platform.

    Args:
        platform: as JAX names it.
        queries: T.
        keys: S.
    """
    if platform == "tpu":
        return "flash_tpu"
    if platform == "cpu" and queries * keys < DENSE_SCORES:
        return "reference"
    return "blockwise"


@functools.cache  # once for every kind of row, not for every layer that is traced
def _say(name: str, platform: str, queries: int, keys: int) -> None:
    _log.info("attention of %d queries and %d keys on %s: %s", queries, keys, platform, name)


def _check(q: Array, k: Array, v: Array, spans: Spans) -> None:
    B, T, N, H = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != H:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit: [B,T,N,H], [B,S,K,H] twice"
        )
    if N % k.shape[2]:
        raise ValueError(f"{N} query heads are no multiple of {k.shape[2]} key/value heads")
    for name, array in (("start", spans.start), ("end", spans.end)):
        if array.shape != (B, T):
            raise ValueError(f"spans.{name} has shape {array.shape}, expected {(B, T)}: one interval per query")
