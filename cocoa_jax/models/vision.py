"""The vision tower of both families: patches of any number of images, side by side in one row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cocoa_jax.attention.api import attend
from cocoa_jax.attention.spans import Spans
from cocoa_jax.models.config import VisionConfig
from cocoa_jax.models.layers import (
    GatedMLP,
    LayerNorm,
    Linear,
    QuickMLP,
    RMSNorm,
    scan_layers,
    stacked,
)
from cocoa_jax.models.rope import Rotation, vision_rotation

EPS = 1e-6  # of every norm in both towers; no published config.json carries it


def _norm(config: VisionConfig, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    return (RMSNorm if config.family == "2.5" else LayerNorm)(config.width, eps=EPS, rngs=rngs)


class VisionAttention(nnx.Module):
    """Multi-head attention with one joint map for queries, keys and values."""

    def __init__(self, config: VisionConfig, *, attention: str | None, rngs: nnx.Rngs):
        self.heads, self.implementation = config.heads, attention
        self.qkv = Linear(config.width, 3 * config.width, bias=True, rngs=rngs)
        self.proj = Linear(config.width, config.width, bias=True, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B P E"], rotation: Rotation, spans: Spans) -> Float[Array, "B P E"]:
        B, P, E = x.shape
        q, k, v = (part.reshape(B, P, self.heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        q, k, scale = rotation.apply(q), rotation.apply(k), (E // self.heads) ** -0.5
        out = attend(q, k, v, spans, scale=scale, implementation=self.implementation)
        return self.proj(out.reshape(B, P, E))


class VisionLayer(nnx.Module):
    """Attention and MLP behind norms: LayerNorm and QuickGELU in family 2, RMSNorm and SwiGLU in 2.5."""

    def __init__(self, config: VisionConfig, *, attention: str | None, rngs: nnx.Rngs):
        E, F = config.width, config.mlp_width
        self.norm1 = _norm(config, rngs)
        self.attention = VisionAttention(config, attention=attention, rngs=rngs)
        self.norm2 = _norm(config, rngs)
        if config.family == "2.5":
            self.mlp: GatedMLP | QuickMLP = GatedMLP(E, F, bias=True, rngs=rngs)
        else:
            self.mlp = QuickMLP(E, F, rngs=rngs)

    def __call__(self, x: Float[Array, "B P E"], rotation: Rotation, spans: Spans) -> Float[Array, "B P E"]:
        x = x + self.attention(self.norm1(x), rotation, spans)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """Joins the adjacent patches of a unit and maps them to the width of the language model."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        joined = config.width * config.unit_patches
        self.joined = joined
        self.norm = _norm(config, rngs)
        self.fc1 = Linear(joined, joined, bias=True, rngs=rngs)
        self.fc2 = Linear(joined, config.out_width, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B U D"]:
        joined = self.norm(x).reshape(x.shape[0], -1, self.joined)
        return self.fc2(jax.nn.gelu(self.fc1(joined), approximate=False))


class VisionTower(nnx.Module):
    """Patches to visual tokens; order, windows and positions come from the host as arrays."""

    def __init__(self, config: VisionConfig, *, attention: str | None, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = Linear(config.patch_values, config.width, bias=False, rngs=rngs)
        self.layers = stacked(lambda rngs: VisionLayer(config, attention=attention, rngs=rngs), config.layers, rngs)
        self.merger = Merger(config, rngs=rngs)

    @jax.named_scope("vision")
    def states(
        self,
        patches: Float[Array, "B P C"],
        positions: Int[Array, "B P 2"],
        spans: Spans,
        windows: Spans | None,
        *,
        remat: str,
    ) -> tuple[Float[Array, "B P E"], Float[Array, "L B P E"]]:
        """The patches after the last layer, before the merger, and what entered each layer.

        Args:
            patches: normalised pixels, the patches of a unit adjacent, images in any order.
            positions: row and column of each patch in its image.
            spans: what each patch sees in a full layer.
            windows: what it sees in a windowed layer; None where the family has none.
            remat: see ``scan_layers``.
        """
        rotation = vision_rotation(positions, self.config.width // self.config.heads)

        def call(layer: VisionLayer, x: Array, full: Bool[Array, ""]) -> Array:
            seen = spans
            if windows is not None:
                seen = Spans(jnp.where(full, spans.start, windows.start), jnp.where(full, spans.end, windows.end))
            return layer(x, rotation, seen)

        full = np.isin(np.arange(self.config.layers), self.config.full_layers)
        return scan_layers(self.layers, self.patch_embed(patches), call, jnp.asarray(full), remat=remat)
