"""The few building blocks that both towers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cocoa_jax.attention.blockwise import LSE, OUT
from cocoa_jax.models.low_rank import PRODUCT, LowRank, TrainedRows
from cocoa_jax.models.spread import look_up, over_rows

Module = TypeVar("Module", bound=nnx.Module)


class Linear(nnx.Module):
    """``x @ kernel + bias``, computed in the type of ``x``; kernel [in, out], stored in float32 at birth."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * inputs**-0.5)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.adapter: LowRank | None = nnx.data(None)  # given by models/lora.py

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        # As one matrix: XLA on CPUs runs the backward pass of a product of higher rank at half the speed.
        rows, kernel = x.reshape(-1, x.shape[-1]), self.kernel[...]
        if self.bias is None and self.adapter is None:
            y = rows @ kernel.astype(x.dtype)
        else:  # rounded once, behind all that is added
            y = jnp.matmul(rows, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
            if self.adapter is not None:
                y = self.adapter(rows, y, kernel)
            y = (y if self.bias is None else y + self.bias[...]).astype(x.dtype)
        return checkpoint_name(y, PRODUCT).reshape(*x.shape[:-1], y.shape[-1])


class Embedding(nnx.Module):
    """A table [V, D] that is read by row, and serves as the output map where the head is tied."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (rows, width)) * 0.02)
        self.adapter: TrainedRows | None = nnx.data(None)  # given by models/lora.py

    def __call__(self, ids: Int[Array, "*B"], dtype: jnp.dtype) -> Float[Array, "*B D"]:
        words = look_up(self.table[...], ids).astype(dtype)
        return words if self.adapter is None else self.adapter.read(words, ids)

    def score(self, hidden: Float[Array, "*B D"], kernel: Float[Array, "D V"] | None = None) -> Float[Array, "*B V"]:
        """Products with every row, float32: the LM head where it is tied to the table.

        Args:
            kernel: the table's transpose, for a caller that has put it somewhere.
        """
        kernel = (self.table[...].T if kernel is None else kernel).astype(hidden.dtype)
        scores = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return scores if self.adapter is None else self.adapter.score(scores, hidden)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, in float32 up to the scale: Hugging Face rounds before it, and strays further."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with bias, in float32."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


class GatedMLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up_proj = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down_proj = Linear(hidden, width, bias=bias, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class QuickMLP(nnx.Module):
    """``fc2(quick_gelu(fc1(x)))``, where quick_gelu(x) is ``x * sigmoid(1.702 x)``."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, hidden, bias=True, rngs=rngs)
        self.fc2 = Linear(hidden, width, bias=True, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x = self.fc1(x)
        return self.fc2(x * jax.nn.sigmoid(1.702 * x))


def stacked(make: Callable[[nnx.Rngs], Module], layers: int, rngs: nnx.Rngs) -> Module:
    """``layers`` modules of one kind with their parameters stacked on a leading axis L."""
    return nnx.vmap(make)(rngs.split(layers))


# By name and not by operation: a product is summed in float32, and kept as it is rounded behind all that is added.
ATTENTION = jax.checkpoint_policies.save_only_these_names(OUT, LSE)
PRODUCTS = jax.checkpoint_policies.save_only_these_names(OUT, LSE, PRODUCT)


def scan_layers(
    stack: Module, x: Array, call: Callable[[Module, Array, Array], Array], flags: Array, *, remat: str
) -> tuple[Array, Array]:
    """Run a stack by ``lax.scan``: one compiled body whatever the depth.

    Args:
        stack: a module made by ``stacked``.
        x: what the layers hand on.
        call: ``(layer, x, flag) -> x``.
        flags: [L, ...], what differs between layers beside their parameters.
        remat: what the backward pass finds: ``none``, every activation; ``products``, those that a matrix product or
            attention gives, the rest being made again; ``attention``, what attention gave and what entered each layer;
            ``full``, what entered each layer alone.

    Returns:
        What the last layer gives, and [L, ...] of what entered each layer (free unless it is used).
    """
    graph, params = nnx.split(stack)

    def body(carry: Array, layer: tuple[nnx.State, Array]) -> tuple[Array, Array]:
        state, flag = layer
        return over_rows(call(nnx.merge(graph, state), carry, flag)), carry

    # A scan keeps the two passes apart by itself: the barriers that prevent_cse sets would only be in the way.
    policies = {
        "none": body,
        "products": jax.checkpoint(body, policy=PRODUCTS, prevent_cse=False),
        "attention": jax.checkpoint(body, policy=ATTENTION),
        "full": jax.checkpoint(body),
    }
    if remat not in policies:
        raise ValueError(f"remat policy {remat!r} does not exist: choose one of {sorted(policies)}")
    return jax.lax.scan(policies[remat], over_rows(x), (params, flags))
