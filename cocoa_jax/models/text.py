"""The language model: a pre-norm decoder whose attention sees what its spans say, in any direction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cocoa_jax.attention.api import attend
from cocoa_jax.attention.spans import Spans
from cocoa_jax.models.config import TextConfig
from cocoa_jax.models.layers import Embedding, GatedMLP, Linear, RMSNorm, scan_layers, stacked
from cocoa_jax.models.rope import Rotation, text_rotation


class Attention(nnx.Module):
    """Grouped-query attention; queries, keys and values have biases, the output map has none."""

    def __init__(self, config: TextConfig, *, attention: str | None, rngs: nnx.Rngs):
        self.head_width = config.head_width
        self.implementation = attention
        D, H = config.width, config.head_width
        self.q_proj = Linear(D, config.heads * H, bias=True, rngs=rngs)
        self.k_proj = Linear(D, config.kv_heads * H, bias=True, rngs=rngs)
        self.v_proj = Linear(D, config.kv_heads * H, bias=True, rngs=rngs)
        self.o_proj = Linear(config.heads * H, D, bias=False, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation, spans: Spans) -> Float[Array, "B T D"]:
        B, T, _ = x.shape
        H = self.head_width
        q = rotation.apply(self.q_proj(x).reshape(B, T, -1, H))
        k = rotation.apply(self.k_proj(x).reshape(B, T, -1, H))
        v = self.v_proj(x).reshape(B, T, -1, H)
        seen = attend(q, k, v, spans, scale=H**-0.5, implementation=self.implementation)
        return self.o_proj(seen.reshape(B, T, -1))

    def weights(self, x: Float[Array, "B T D"], rotation: Rotation, spans: Spans) -> Float[Array, "B N T T"]:
        """How much each query takes of each key, float32; dense, for looking at. Zeros where a query sees nothing."""
        B, T, _ = x.shape
        H = self.head_width
        q = rotation.apply(self.q_proj(x).reshape(B, T, -1, H))
        k = rotation.apply(self.k_proj(x).reshape(B, T, -1, H))
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
        seen = spans.as_mask(T)[:, None]
        return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), 0.0)


class DecoderLayer(nnx.Module):
    """Attention and a gated MLP, each behind an RMS norm and added to the residual."""

    def __init__(self, config: TextConfig, *, attention: str | None, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, attention=attention, rngs=rngs)
        self.post_norm = RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation, spans: Spans) -> Float[Array, "B T D"]:
        x = x + self.attention(self.input_norm(x), rotation, spans)
        return x + self.mlp(self.post_norm(x))


class TextModel(nnx.Module):
    """Token embedding, L decoder layers, final norm and the LM head (tied to the embedding or not)."""

    def __init__(self, config: TextConfig, *, attention: str | None, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, rngs=rngs)
        self.layers = stacked(lambda rngs: DecoderLayer(config, attention=attention, rngs=rngs), config.layers, rngs)
        self.norm = RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        self.head = None if config.tied_head else Linear(config.width, config.vocab_size, bias=False, rngs=rngs)

    def rotation(self, positions: Int[Array, "B T 3"]) -> Rotation:
        """The angles of every token, shared by all layers."""
        return text_rotation(positions, self.config.head_width, self.config.rope_theta, self.config.mrope_sections)

    @jax.named_scope("text")
    def states(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T 3"], spans: Spans, *, remat: str
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"]]:
        """The residual stream after the last layer, before the final norm, and what entered each layer."""
        rotation = self.rotation(positions)
        flags = jnp.zeros(self.config.layers)
        return scan_layers(self.layers, x, lambda layer, x, _: layer(x, rotation, spans), flags, remat=remat)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token scores of states that went through the final norm; float32."""
        if self.head is None:
            return self.embed.score(hidden)
        return jnp.matmul(hidden, self.head.kernel[...].astype(hidden.dtype), preferred_element_type=jnp.float32)
