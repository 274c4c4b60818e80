"""cocoa_jax: CoCoA multimodal embedding models in JAX and Flax for TPU pods (arXiv 2603.01471)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cocoa_jax.embedder import Embedder

__all__ = ["Embedder", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Lazy: a data worker imports this package and must never start a JAX back end.
    if name == "Embedder":
        from cocoa_jax.embedder import Embedder

        return Embedder
    raise AttributeError(f"cocoa_jax has no attribute {name!r}")
