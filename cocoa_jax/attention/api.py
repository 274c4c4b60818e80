"""``attend``: the one door to attention under spans."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float

from cocoa_jax.attention import reference
from cocoa_jax.attention.spans import Spans

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"reference": reference.attend}


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
        implementation: a name from ``IMPLEMENTATIONS``; None takes the best one for the platform.

    Returns:
        The attended values; a query whose span is empty gives zeros and passes no gradient.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that does not exist.
    """
    _check(q, k, v, spans)
    name = "reference" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {name!r} does not exist: choose one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](q, k, v, spans, scale)


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
