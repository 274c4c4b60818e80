"""The image decoder of stage 1: one extra bidirectional decoder layer and a linear map to pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cocoa_jax.attention.spans import Spans
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.layers import Linear
from cocoa_jax.models.qwen2_vl import Params
from cocoa_jax.models.rope import text_rotation
from cocoa_jax.models.text import DecoderLayer


class ImageDecoder(nnx.Module):
    """States of the language model -> processor-normalised pixels of a visual unit, 4 C numbers."""

    def __init__(self, config: Qwen2VLConfig, *, attention: str | None = None, rngs: nnx.Rngs):
        self.config = config.text
        self.layer = DecoderLayer(config.text, attention=attention, rngs=rngs)
        unit_values = config.vision.unit_patches * config.vision.patch_values
        self.proj = Linear(config.text.width, unit_values, bias=True, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        positions: Int[Array, "B T 3"],
        spans: Spans,
        token_of_unit: Int[Array, "B U"],
    ) -> Float[Array, "B U W"]:
        """The pixels of every unit, read at the token that shows it.

        Args:
            hidden: states after the final norm.
            positions: as the backbone's.
            spans: as the backbone's; the layer runs over the whole row.
            token_of_unit: the column of the token of each unit.
        """
        rotation = text_rotation(positions, self.config.head_width, self.config.rope_theta, self.config.mrope_sections)
        x = self.layer(hidden, rotation, spans)
        return self.proj(jnp.take_along_axis(x, token_of_unit[..., None], axis=1))


def decoder_graph(config: Qwen2VLConfig, attention: str | None = None) -> tuple[nnx.GraphDef, Params]:
    """The structure of the decoder and the shapes of its parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: ImageDecoder(config, attention=attention, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def init_decoder(config: Qwen2VLConfig, backbone: Params, seed: int) -> Params:
    """A decoder whose layer is a copy of the middle layer of the language model, and a small random map."""
    params = nnx.to_pure_dict(nnx.state(ImageDecoder(config, rngs=nnx.Rngs(seed))))
    middle = config.text.layers // 2
    # Small, so that the first drawings are grey rather than noise, whose error would drown the text loss.
    kernel = params["proj"]["kernel"] * (0.02 * config.text.width**0.5)
    return params | {
        "proj": params["proj"] | {"kernel": kernel},
        "layer": jax.tree.map(lambda leaf: leaf[middle], backbone["text"]["layers"]),
    }
