"""A small, real Qwen2-VL in Hugging Face form, made from nothing but texts and a seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.huggingface import write_folder
from cocoa_jax.models.config import Qwen2VLConfig, read_config

# Qwen2-VL's own special tokens, and the mask token of stage 1.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|mask|>",
)
_PAD, _END = "<|endoftext|>", "<|im_end|>"
_BYTES = 256  # a byte-level vocabulary starts with all of them
_ROW_MULTIPLE = 64  # rows of the embedding, so that it divides over devices


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
    """Sizes of a backbone made from scratch; patches and merging are those of every Qwen2-VL."""

    vocab_size: int = 4096
    width: int = 192
    layers: int = 6
    heads: int = 3
    kv_heads: int = 1
    mlp_width: int = 512
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp_ratio: int = 4
    min_pixels: int = 28 * 28  # one visual token
    max_pixels: int = 32 * 28 * 28  # 32 visual tokens
    max_positions: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < _BYTES + len(SPECIAL_TOKENS):
            smallest = _BYTES + len(SPECIAL_TOKENS)
            raise CheckpointError(f"vocab_size is {self.vocab_size}: bytes and special tokens take {smallest}")
        if self.width % self.heads or self.head_width % 16:
            raise CheckpointError(
                f"width {self.width} over {self.heads} heads: a head must be a multiple of 16 wide (M-RoPE sections)"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise CheckpointError(f"min_pixels {self.min_pixels} must be positive and at most {self.max_pixels}")

    @property
    def head_width(self) -> int:
        """Width of one head of the language model."""
        return self.width // self.heads

    @property
    def mrope_sections(self) -> tuple[int, int, int]:
        """Time, height and width in the proportions of Qwen2-VL (16, 24, 24 of 64)."""
        return self.head_width // 8, self.head_width * 3 // 16, self.head_width * 3 // 16

    @property
    def rows(self) -> int:
        """Rows of the embedding: the vocabulary, rounded up."""
        return math.ceil(self.vocab_size / _ROW_MULTIPLE) * _ROW_MULTIPLE


def make_backbone(
    folder: str | Path,
    settings: ScratchConfig,
    texts: Iterable[str],
    abstract_params: Callable[[Qwen2VLConfig], Mapping[str, Any]],
) -> None:
    """Make the folder of a Qwen2-VL: config, tokenizer trained on ``texts``, preprocessor, random weights (float32).

    The same settings and texts give the same bytes.

    Args:
        folder: must not exist, or be empty; it appears whole or not at all.
        abstract_params: gives the shapes of the parameters of a config.

    Raises:
        CheckpointError: sizes that contradict each other, or a destination that is taken.
    """
    with tempfile.TemporaryDirectory() as made:
        side = Path(made)
        tokenizer = train_tokenizer(texts, settings.vocab_size)
        _write_tokenizer(side, tokenizer, settings.max_positions)
        _write_json(side / "config.json", _config(settings, tokenizer))
        _write_json(side / "preprocessor_config.json", _preprocessor(settings))
        params = _random_params(abstract_params(read_config(side)), settings.seed)
        write_folder(folder, params, side)


def _config(settings: ScratchConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json in the flat form that the hub has, which every version of transformers reads."""
    token = tokenizer.token_to_id
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": settings.rows,
        "hidden_size": settings.width,
        "intermediate_size": settings.mlp_width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": settings.max_positions,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(settings.mrope_sections)},
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": settings.layers,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": token(_PAD),
        "eos_token_id": token(_END),
        "pad_token_id": token(_PAD),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_token_id": token("<|vision_pad|>"),
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": settings.vision_layers,
            "embed_dim": settings.vision_width,
            "hidden_size": settings.width,
            "hidden_act": "quick_gelu",
            "mlp_ratio": settings.vision_mlp_ratio,
            "num_heads": settings.vision_heads,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def _preprocessor(settings: ScratchConfig) -> dict[str, Any]:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD  # slow to import

    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
    }


# ---------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer set up as Qwen2's, of at most ``vocab_size`` entries, special tokens last."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # slow to import

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt, which transformers 4 also asks for
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.token_to_id(text)): {"content": text, **flags} for text in SPECIAL_TOKENS}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [text for text in SPECIAL_TOKENS if text not in (_PAD, _END)],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": _END,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": _PAD,
        "split_special_tokens": False,
        "unk_token": None,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------- weights


def _random_params(abstract: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Random weights; each leaf depends on the seed and its own path only."""
    leaves = flatten_dict(abstract, sep=".")
    return unflatten_dict({path: _random_leaf(path, leaf.shape, seed) for path, leaf in leaves.items()}, sep=".")


def _random_leaf(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal with deviation 0.02 (embedding) or 1 / sqrt(inputs) (kernels, [..., in, out]); norms 1, biases 0."""
    name = path.rsplit(".", 1)[-1]
    if name == "scale":
        return np.ones(shape, np.float32)
    if name == "bias":
        return np.zeros(shape, np.float32)
    digest = hashlib.sha256(path.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    deviation = 0.02 if name == "table" else shape[-2] ** -0.5
    return rng.standard_normal(shape, np.float32) * np.float32(deviation)
