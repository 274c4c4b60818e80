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


VISION_THETA = 10000.0  # of the rotary positions of both towers; config.json of transformers 5 repeats it
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
    top = _Fields(values, origin)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ConfigError(
            f"{origin}: model_type is {kind!r}, expected one of {sorted(_FAMILIES)}: give a checkpoint of theirs"
        )
    family = _FAMILIES[kind]
    # The flat form keeps the text fields at the top level; the nested one has a section for them.
    text = top.section("text_config") if "text_config" in top else _Fields(values, f"{origin}: text")
    vision = top.section("vision_config")
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
    rope = text.section("rope_parameters" if "rope_parameters" in text else "rope_scaling")
    config = Qwen2VLConfig(
        family=family,
        text=_text(text, rope, top),
        vision=_vision(vision, family),
        image_token=top.whole("image_token_id", 0),
        video_token=top.whole("video_token_id", 0),
        vision_start_token=top.whole("vision_start_token_id", 0),
        vision_end_token=top.whole("vision_end_token_id", 0),
    )
    problems = [*_contradictions(config), *_not_computed(config, text, rope, vision)]
    if problems:
        raise ConfigError(f"{origin}: " + "; ".join(problems))
    return config


class _Fields:
    """A mapping whose missing and impossible values are named with the file that has them."""

    def __init__(self, values: Any, origin: str):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin} is {values!r}, expected named fields: copy config.json again")
        self._values, self._origin = values, origin

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise ConfigError(f"{self._origin} lacks the field {key!r}: it is not a Qwen2-VL or Qwen2.5-VL config")
        return self._values[key]

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def section(self, key: str) -> _Fields:
        """The fields that lie under a key."""
        return _Fields(self[key], f"{self._origin}: {key}")

    def whole(self, key: str, least: int = 1) -> int:
        """A whole number."""
        return int(self._expected(key, _is_whole(self[key], least), f"a whole number of at least {least}"))

    def wholes(self, key: str, count: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers, of any length where ``count`` is None."""
        value = self[key]
        fits = isinstance(value, list | tuple) and all(_is_whole(one, 0) for one in value)
        fits = fits and count in (None, len(value))
        return tuple(self._expected(key, fits, f"a list of {count or 'any number of'} whole numbers"))

    def positive(self, key: str) -> float:
        """A number above 0."""
        value = self[key]
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        return float(self._expected(key, fits, "a number above 0"))

    def flag(self, key: str) -> bool:
        """Whether something holds; no where it is left out, as transformers has it."""
        return key in self and bool(self._expected(key, isinstance(self[key], bool), "true or false"))

    def _expected(self, key: str, fits: bool, wanted: str) -> Any:
        if not fits:
            raise ConfigError(f"{self._origin} has {key} = {self[key]!r}, expected {wanted}: copy config.json again")
        return self[key]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _text(text: _Fields, rope: _Fields, top: _Fields) -> TextConfig:
    width, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    return TextConfig(
        vocab_size=text.whole("vocab_size"),
        # Left out where it has transformers' default, like the tied head below.
        max_positions=text.whole("max_position_embeddings") if "max_position_embeddings" in text else 32768,
        width=width,
        mlp_width=text.whole("intermediate_size"),
        layers=text.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=text.whole("num_key_value_heads"),
        head_width=text.whole("head_dim") if "head_dim" in text else width // heads,
        norm_eps=text.positive("rms_norm_eps"),
        rope_theta=(rope if "rope_theta" in rope else text).positive("rope_theta"),
        mrope_sections=rope.wholes("mrope_section", 3),  # type: ignore[arg-type]
        # The hub's flat files leave the field out when it has transformers' default, which is untied.
        tied_head=(top if "tie_word_embeddings" in top else text).flag("tie_word_embeddings"),
    )


def _vision(vision: _Fields, family: str) -> VisionConfig:
    newer = family == "2.5"
    width = vision.whole("hidden_size" if newer else "embed_dim")
    return VisionConfig(
        family=family,
        width=width,
        mlp_width=vision.whole("intermediate_size") if newer else int(width * vision.positive("mlp_ratio")),
        layers=vision.whole("depth"),
        heads=vision.whole("num_heads"),
        out_width=vision.whole("out_hidden_size" if newer else "hidden_size"),
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=vision.whole("temporal_patch_size"),
        merge_size=vision.whole("spatial_merge_size"),
        # Hub files of Qwen2.5-VL spell it in_chans; transformers reads in_channels and defaults to 3.
        channels=vision.whole("in_channels") if "in_channels" in vision else 3,
        window=vision.whole("window_size") if newer else 0,
        full_layers=vision.wholes("fullatt_block_indexes") if newer else (),
        tokens_per_second=vision.positive("tokens_per_second") if newer else 1.0,
    )


def _contradictions(config: Qwen2VLConfig) -> list[str]:
    """What cannot be true together."""
    text, vision = config.text, config.vision
    marks = (config.image_token, config.video_token, config.vision_start_token, config.vision_end_token)
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
        (
            len(set(marks)) == 4 and max(marks) < text.vocab_size,
            f"image, video, start and end tokens {marks} are not different ids below {text.vocab_size}",
        ),
    ]
    return [f"{message}: copy config.json again" for holds, message in rules if not holds]


def _not_computed(config: Qwen2VLConfig, text: _Fields, rope: _Fields, vision: _Fields) -> list[str]:
    """What transformers would compute otherwise, and this backbone would not: no published checkpoint has it."""
    problems = []
    activation = "silu" if config.family == "2.5" else "quick_gelu"
    for where, fields, wanted in (("text", text, "silu"), ("vision", vision, activation)):
        if "hidden_act" in fields and fields["hidden_act"] != wanted:
            problems.append(f"{where} hidden_act is {fields['hidden_act']!r}, only {wanted!r} is computed")
    for key in ("rope_type", "type"):
        if key in rope and rope[key] not in ("default", "mrope"):
            problems.append(f"{key} of the text's rope is {rope[key]!r}, only 'default' and 'mrope' are computed")
    if "rope_parameters" in vision and "rope_theta" in (own := vision.section("rope_parameters")):
        theta = own.positive("rope_theta")
        if theta != VISION_THETA:
            problems.append(f"vision rope_theta is {theta}, only {VISION_THETA} is computed")
    if _slides(text, config.text.layers):
        problems.append("layers of the text attend by a sliding window, which is not computed")
    return [f"{problem}: give a checkpoint as it was published" for problem in problems]


def _slides(text: _Fields, layers: int) -> bool:
    """Whether any layer of the text has a sliding window; source: Qwen2VLTextConfig of transformers 5.23."""
    if "layer_types" in text:
        kinds = text["layer_types"]
        return not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    first = text.whole("max_window_layers", 0) if "max_window_layers" in text else 80
    return text.flag("use_sliding_window") and "sliding_window" in text and first < layers
