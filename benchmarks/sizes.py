"""Sizes of the random backbones that are compared, as config.json has them, and weights that both sides can draw."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cocoa_jax.checkpoints.hub_layout import plan
from cocoa_jax.models.config import Qwen2VLConfig, parse_config
from cocoa_jax.models.qwen2_vl import abstract_params

FAMILIES = ("2", "2.5")

# vocabulary, width, MLP width, layers, heads, key/value heads; M-RoPE sections
_TEXT: dict[str, tuple[tuple[int, ...], list[int]]] = {
    "tiny": ((160, 64, 96, 3, 4, 2), [2, 3, 3]),
    "middle": ((32768, 768, 2560, 9, 6, 2), [16, 24, 24]),  # heads 128 wide
    "full": ((151936, 1536, 8960, 28, 12, 2), [16, 24, 24]),  # Qwen2-VL 2B
}
# width, MLP ratio (family 2), MLP width (2.5), layers, heads, patch; window in pixels, full layers
_VISION: dict[str, tuple[tuple[int, ...], int, list[int]]] = {
    "tiny": ((32, 2, 48, 3, 2, 4), 16, [1]),
    "middle": ((320, 4, 860, 4, 4, 14), 112, [1, 3]),  # heads 80 wide
    "full": ((1280, 4, 3420, 32, 16, 14), 112, [7, 15, 23, 31]),
}


def config_values(family: str, size: str, tied: bool = True) -> dict[str, Any]:
    """config.json of a backbone in the flat form of the hub; the last ten ids of the vocabulary are special."""
    (vocab, width, mlp, layers, heads, kv_heads), sections = _TEXT[size]
    (vision_width, ratio, vision_mlp, depth, vision_heads, patch), window, full = _VISION[size]
    vision = {"depth": depth, "num_heads": vision_heads, "patch_size": patch, "in_channels": 3}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "2":
        vision |= {"embed_dim": vision_width, "hidden_size": width, "mlp_ratio": ratio}
    else:
        vision |= {"hidden_size": vision_width, "out_hidden_size": width, "intermediate_size": vision_mlp}
        vision |= {"window_size": window, "fullatt_block_indexes": full, "tokens_per_second": 2}
    return {
        "model_type": "qwen2_vl" if family == "2" else "qwen2_5_vl",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "image_token_id": vocab - 10,
        "video_token_id": vocab - 9,
        "vision_start_token_id": vocab - 8,
        "vision_end_token_id": vocab - 7,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "vision_config": vision,
    }


def make_config(family: str, size: str, tied: bool = True) -> Qwen2VLConfig:
    """The same as this project reads it."""
    return parse_config(config_values(family, size, tied))


def random_tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The tensor of a key on the hub: a function of the seed and the key, so that nothing has to be stored.

    Matrices keep the size of what passes through them; norms and biases are no ones and zeros, so that losing one
    shows.
    """
    values = np.random.default_rng((seed, zlib.crc32(key.encode()))).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return values * np.float32(np.prod(shape[1:])) ** np.float32(-0.5)
    norm = key.endswith("weight")
    return values * np.float32(0.1) + np.float32(norm)


def random_params(config: Qwen2VLConfig, seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    """The parameter tree of these tensors, numpy arrays."""
    vision, abstract = config.vision, abstract_params(config)
    patch = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    leaves = {path: np.empty(leaf.shape, dtype) for path, leaf in flatten_dict(abstract, sep=".").items()}
    for key, slot in plan(abstract, patch).items():
        slot.put(random_tensor(key, slot.shape, seed), leaves[slot.path])
    return unflatten_dict(leaves, sep=".")


def parameters(config: Qwen2VLConfig) -> int:
    """How many numbers a backbone of these sizes has."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten_dict(abstract_params(config)).values())
