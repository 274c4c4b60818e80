"""Rotary positions: three axes for the language model (M-RoPE), two for the vision tower."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cocoa_jax.models.config import VISION_THETA


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine of every slot's angles, float32 [B, T, H/2] each; computed once, used by every layer."""

    cos: Array
    sin: Array

    def apply(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Rotate each pair (i, i + H/2) of every head; in float32, as the angles need it."""
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def text_rotation(
    positions: Int[Array, "B T 3"], head_width: int, theta: float, sections: tuple[int, int, int]
) -> Rotation:
    """M-RoPE: the first ``sections[0]`` frequencies turn with time, the next with height, the last with width.

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    half = head_width // 2
    frequencies = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    axis = jnp.repeat(jnp.arange(3), jnp.array(sections), total_repeat_length=half)
    return _rotation(positions.astype(jnp.float32)[..., axis] * frequencies)


def vision_rotation(positions: Int[Array, "B P 2"], head_width: int) -> Rotation:
    """The first quarter of a head's frequencies turns with the patch's row, the second with its column."""
    quarter = head_width // 4
    frequencies = VISION_THETA ** -(jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return _rotation(angles.reshape(*positions.shape[:2], 2 * quarter))


def _rotation(angles: Float[Array, "B T R"]) -> Rotation:
    return Rotation(jnp.cos(angles), jnp.sin(angles))
