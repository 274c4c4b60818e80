"""Qwen2-VL and Qwen2.5-VL as one backbone over explicit spans.

Sources: arXiv 2409.12191 (Qwen2-VL), arXiv 2502.13923 (Qwen2.5-VL); parity with Hugging Face is tested.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.text import TextModel
from cocoa_jax.models.vision import VisionTower

Params = dict[str, Any]  # nested dicts of arrays, the form in which parameters cross every boundary


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a backbone computes, whatever its weights.

    Args:
        dtype: of activations, in both towers.
        remat: see ``layers.scan_layers``.
        chunk_rows: how many rows each device takes at a time; null for all. Fewer need less memory. The batch, its loss
            and its gradients stay those of the whole: stages 1 and 2 add up gradients, stage 3, whose negatives are in
            all chunks, encodes every row twice.
        chunk_remat: whether it does. If not, it keeps of all chunks what ``remat`` leaves to be kept, as it does of all
            rows at a time: for devices with room, where a few rows at a time are faster.
        chunk_tokens: stages 1 and 2, how many predicted tokens of each device meet the LM head at a time; null for all.
        attention: a name from ``attention.api.IMPLEMENTATIONS``; null takes what suits the platform and the shapes.
    """

    dtype: str = "float32"
    remat: str = "none"
    chunk_rows: int | None = None
    chunk_remat: bool = True
    chunk_tokens: int | None = 1024
    attention: str | None = None

    def __post_init__(self) -> None:
        for name, size in (("chunk_rows", self.chunk_rows), ("chunk_tokens", self.chunk_tokens)):
            if size is not None and size < 1:
                raise ValueError(f"compute.{name} is {size}: at least 1, or null for all at once")


class Qwen2VL(nnx.Module):
    """The backbone: pictures and text in, states after the final norm out."""

    def __init__(self, config: Qwen2VLConfig, compute: Compute = Compute(), *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        self.text = TextModel(config.text, attention=compute.attention, rngs=rngs)
        self.vision = VisionTower(config.vision, attention=compute.attention, rngs=rngs)

    def __call__(self, inputs: Inputs) -> Float[Array, "B T D"]:
        """States after the final norm, which the LM head and the embeddings read."""
        return self.text.norm(self.states(inputs)[0])

    def states(self, inputs: Inputs) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"]]:
        """The states before the final norm, and what entered each layer of the language model."""
        return self.text.states(self.embed(inputs), inputs.positions, inputs.spans, remat=self.compute.remat)

    def embed(self, inputs: Inputs) -> Float[Array, "B T D"]:
        """Token embeddings with the visual units in the places of the picture tokens."""
        words = self.text.embed(inputs.tokens, jnp.dtype(self.compute.dtype))
        if inputs.patches.shape[1] == 0:
            return words
        units = self.see(inputs)
        slot = jnp.maximum(inputs.unit, 0)[..., None]
        return jnp.where(inputs.unit[..., None] >= 0, jnp.take_along_axis(units, slot, axis=1), words)

    def see(self, inputs: Inputs) -> Float[Array, "B U D"]:
        """The visual units of every row."""
        patches = inputs.patches.astype(self.compute.dtype)
        x, _ = self.vision.states(
            patches, inputs.patch_positions, inputs.patch_spans, inputs.window_spans, remat=self.compute.remat
        )
        return self.vision.merger(x)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The map of the LM head, in the type in which it is stored."""
        return self.text.head_kernel()

    def logits(self, hidden: Float[Array, "*B D"], kernel: Float[Array, "D V"] | None = None) -> Float[Array, "*B V"]:
        """Next-token scores of states that went through the final norm; float32. ``kernel``: see ``TextModel``."""
        return self.text.logits(hidden, kernel)


def graph_of(config: Qwen2VLConfig, compute: Compute = Compute()) -> tuple[nnx.GraphDef, Params]:
    """The structure of a backbone and the shapes of its parameters, without making any."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Qwen2VL(config, compute, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def abstract_params(config: Qwen2VLConfig) -> Params:
    """Shapes and types of a backbone's parameters as a nested dict of ``jax.ShapeDtypeStruct``."""
    return graph_of(config)[1]


def init_params(config: Qwen2VLConfig, seed: int) -> Params:
    """Random parameters, float32, by the seed."""
    return nnx.to_pure_dict(jax.jit(lambda: nnx.state(Qwen2VL(config, rngs=nnx.Rngs(seed))))())


def bind(graph: nnx.GraphDef, params: Params) -> Any:
    """The module with these parameters; cheap, made anew inside every jitted function."""
    return nnx.merge(graph, params)
