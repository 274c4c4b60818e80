"""Sizes of a Qwen2-VL or Qwen2.5-VL backbone, read from a checkpoint's own ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A checkpoint's ``config.json`` describes something that this backbone is not."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model: L layers of width D, N query and K key/value heads of width H, vocabulary V.

    ``max_positions`` is the end of the positions that the checkpoint was made for.
    """

    vocab_size: int
    max_positions: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    norm_eps: float
    rope_theta: float
    mrope_sections: tuple[int, int, int]
    tied_head: bool


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower: ``family`` 2 (LayerNorm, QuickGELU) or 2.5 (RMSNorm, SwiGLU, windows).

    ``window`` is a side in pixels and ``full_layers`` the layers that see the whole image; family 2 has
    ``window == 0``: every layer sees the whole image.
    """

    family: str
    width: int
    mlp_width: int
    layers: int
    heads: int
    out_width: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    channels: int
    window: int
    full_layers: tuple[int, ...]
    tokens_per_second: float

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch: channels x temporal_patch_size x patch_size^2."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def unit_patches(self) -> int:
        """Patches that are merged into one visual token."""
        return self.merge_size**2


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """A whole backbone and the token ids that mark pictures in its text."""

    family: str
    text: TextConfig
    vision: VisionConfig
    image_token: int
    video_token: int
    vision_start_token: int
    vision_end_token: int


_FAMILIES = {"qwen2_vl": "2", "qwen2_5_vl": "2.5"}


def read_config(folder: str | Path) -> Qwen2VLConfig:
    """Read ``folder/config.json``.

    Raises:
        ConfigError: the file is missing, is no JSON, is of another architecture, or lacks a field.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no config.json: give the folder of a Qwen2-VL or Qwen2.5-VL checkpoint"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error}): copy the checkpoint again") from None
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], origin: str = "config.json") -> Qwen2VLConfig:
    """Read the flat form of the hub or the nested form that transformers 5 writes.

    Raises:
        ConfigError: another ``model_type``, a field that is missing, or sizes that contradict each other.
    """
    kind = values.get("model_type")
    if kind not in _FAMILIES:
        raise ConfigError(f"{origin}: model_type is {kind!r}, expected one of {sorted(_FAMILIES)}")
    family = _FAMILIES[kind]
    # The flat form keeps the text fields at the top level; the nested one has a section for them.
    text = _Fields(values.get("text_config", values), f"{origin}: text")
    top = _Fields(values, origin)
    vision = _Fields(top["vision_config"], f"{origin}: vision_config")
    config = Qwen2VLConfig(
        family=family,
        text=_text(text, top),
        vision=_vision(vision, family),
        image_token=top["image_token_id"],
        video_token=top["video_token_id"],
        vision_start_token=top["vision_start_token_id"],
        vision_end_token=top["vision_end_token_id"],
    )
    _check(config, origin)
    return config


class _Fields:
    """A mapping whose missing keys are named with the file that lacks them."""

    def __init__(self, values: Mapping[str, Any], origin: str):
        self._values, self._origin = values, origin

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise ConfigError(f"{self._origin} lacks the field {key!r}: it is not a Qwen2-VL or Qwen2.5-VL config")
        return self._values[key]

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def first(self, *keys: str) -> Any:
        """The first of several spellings that is there; the error names the last."""
        return self[next((key for key in keys if key in self), keys[-1])]


def _text(text: _Fields, top: _Fields) -> TextConfig:
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
    rope = _Fields(text.first("rope_parameters", "rope_scaling"), "the text config's rope parameters")
    heads = text["num_attention_heads"]
    tied = top if "tie_word_embeddings" in top else text
    return TextConfig(
        vocab_size=text["vocab_size"],
        # Left out where it has transformers' default, like the tied head below.
        max_positions=text.first("max_position_embeddings") if "max_position_embeddings" in text else 32768,
        width=text["hidden_size"],
        mlp_width=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_width=text["head_dim"] if "head_dim" in text else text["hidden_size"] // heads,
        norm_eps=float(text["rms_norm_eps"]),
        rope_theta=float((rope if "rope_theta" in rope else text)["rope_theta"]),
        mrope_sections=tuple(rope["mrope_section"]),
        # The hub's flat files leave the field out when it has transformers' default, which is untied.
        tied_head=bool(tied["tie_word_embeddings"]) if "tie_word_embeddings" in tied else False,
    )


def _vision(vision: _Fields, family: str) -> VisionConfig:
    newer = family == "2.5"
    width = vision["hidden_size"] if newer else vision["embed_dim"]
    return VisionConfig(
        family=family,
        width=width,
        mlp_width=vision["intermediate_size"] if newer else int(width * vision["mlp_ratio"]),
        layers=vision["depth"],
        heads=vision["num_heads"],
        out_width=vision["out_hidden_size"] if newer else vision["hidden_size"],
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
        # Hub files of Qwen2.5-VL spell it in_chans; transformers reads in_channels and defaults to 3.
        channels=vision.first("in_channels") if "in_channels" in vision else 3,
        window=vision["window_size"] if newer else 0,
        full_layers=tuple(vision["fullatt_block_indexes"]) if newer else (),
        tokens_per_second=float(vision["tokens_per_second"]) if newer else 1.0,
    )


def _check(config: Qwen2VLConfig, origin: str) -> None:
    text, vision = config.text, config.vision
    rules = [
        (text.heads % text.kv_heads == 0, f"{text.heads} heads are no multiple of {text.kv_heads} key/value heads"),
        (
            sum(text.mrope_sections) * 2 == text.head_width,
            f"M-RoPE sections {text.mrope_sections} must add up to half of the head width {text.head_width}",
        ),
        (vision.width % vision.heads == 0, f"vision width {vision.width} is no multiple of {vision.heads} heads"),
        (
            vision.width // vision.heads % 4 == 0,
            f"vision head width {vision.width // vision.heads} is no multiple of 4",
        ),
        (
            vision.out_width == text.width,
            f"vision tower gives width {vision.out_width}, the text model takes {text.width}",
        ),
    ]
    problems = [message for holds, message in rules if not holds]
    if problems:
        raise ConfigError(f"{origin}: " + "; ".join(problems))
