"""What a checkpoint's folder and the settings say about tokens and pixels, checked against the model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping

import tokenizers

from cocoa_jax.data.pixels import PixelSettings, normalisation_table
from cocoa_jax.data.vision_plan import Positions
from cocoa_jax.models.config import Qwen2VLConfig, VisionConfig


class ProcessorError(ValueError):
    """The folder's tokenizer or picture settings do not fit the model or the settings."""


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """How contents become tokens.

    Args:
        min_pixels, max_pixels: limits of a resized picture or frame, its aspect kept; None takes the checkpoint's own.
        max_text_tokens: longest text of one block, the rest is cut off.
        positions: ``mrope``, or ``text_1d`` for checkpoints that counted image tokens like text.
        mask_token, bridge_tokens: entries of the checkpoint's tokenizer; where it has none of that name, unused rows of
            the embedding.
        resolution: in place of both limits: ``square:448`` squashes every picture to that many pixels a side, as the
            published runs do; ``dynamic:4..256`` keeps the aspect and gives a picture so many visual tokens.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_text_tokens: int = 512
    positions: Positions = "mrope"
    mask_token: str = "<|mask|>"
    bridge_tokens: tuple[str, ...] = ("<|im_end|>",)
    resolution: str | None = None


def without_added_tokens(full: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer that knows no special tokens, so that none can be typed.

    ``split_special_tokens`` of transformers is not enough: it leaves added tokens alone that are not special,
    such as ``<tool_call>``, or a mask token that somebody added as an ordinary one.
    """
    spec = json.loads(full.to_str())
    names = {token["content"]: token["id"] for token in spec["added_tokens"]}
    plain = tokenizers.Tokenizer.from_str(
        json.dumps({**spec, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
    )
    for name in names:
        typed = set(plain.encode(name, add_special_tokens=False).ids)
        if typed & set(names.values()):
            raise ProcessorError(
                f"typing {name!r} gives token {names[name]} even as plain text: remove its merges from the tokenizer"
            )
    return plain


@dataclasses.dataclass(frozen=True)
class MethodTokens:
    """The tokens that the method needs beside those of the backbone.

    Args:
        mask_id, bridge_ids: all different, and none with another meaning.
        added: those that the tokenizer does not have, by name, in rows of the embedding that it leaves unused.
        used_rows: how many rows it uses, the first ones.
    """

    mask_id: int
    bridge_ids: tuple[int, ...]
    added: Mapping[str, int]
    used_rows: int


def method_tokens(
    full: tokenizers.Tokenizer, pad_id: int | None, config: Qwen2VLConfig, settings: ProcessorConfig
) -> MethodTokens:
    """Where the mask and the bridge tokens are in the tokenizer, or will be: the same rows whenever it is asked."""
    if not settings.bridge_tokens:
        raise ProcessorError("bridge_tokens is empty: name at least one token, such as '<|im_end|>'")
    rows, used = config.text.vocab_size, max(full.get_vocab(with_added_tokens=True).values()) + 1
    taken = {
        pad_id: "the padding token",
        config.image_token: "the image token",
        config.video_token: "the video token",
        config.vision_start_token: "the start of a picture",
        config.vision_end_token: "the end of a picture",
    }
    unused = (row for row in range(used, rows) if row not in taken)
    added: dict[str, int] = {}
    ids = []
    for role, token in [("mask_token", settings.mask_token), *(("bridge_tokens", t) for t in settings.bridge_tokens)]:
        number = full.token_to_id(token)
        if number is None:
            number = added[token] if token in added else next(unused, None)
            if number is None:
                raise ProcessorError(
                    f"{role} {token!r} is not in the tokenizer, and no row of the {rows} of the embedding is unused: "
                    "name another token"
                )
            added[token] = number
        if number >= rows:
            raise ProcessorError(f"{role} {token!r} has id {number}, the embedding has {rows} rows: name another token")
        if number in taken:
            raise ProcessorError(f"{role} {token!r} (id {number}) is already {taken[number]}: name another token")
        taken[number] = f"the token {token!r} of {role}"
        ids.append(number)
    return MethodTokens(ids[0], tuple(ids[1:]), added, used)


def pixel_settings(pictures: object, config: Qwen2VLConfig, settings: ProcessorConfig) -> PixelSettings:
    """Sizes and values of pixels, from the picture processor of transformers that read the folder."""
    own = pictures.to_dict()  # type: ignore[attr-defined]
    vision: VisionConfig = config.vision
    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    sizes["merge_size"] = vision.merge_size
    for field, expected in sizes.items():
        if own[field] != expected:
            raise ProcessorError(
                f"preprocessor_config.json has {field} {own[field]}, config.json {expected}: correct the former"
            )
    steps = [field for field in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb") if not own[field]]
    if steps or vision.channels != 3:
        raise ProcessorError(
            f"preprocessor_config.json turns off {steps} with {vision.channels} channels: "
            "only the published steps on 3 channels are supported"
        )
    unit = (vision.patch_size * vision.merge_size) ** 2
    square, least, most = _limits(settings, own["size"], vision.patch_size * vision.merge_size)
    if not 0 < least <= most or most < unit:
        raise ProcessorError(
            f"min_pixels {least} and max_pixels {most} must rise, the latter to at least {unit}: correct them"
        )
    return PixelSettings(
        **sizes,
        min_pixels=least,
        max_pixels=most,
        square=square,
        resample=int(own["resample"]),
        table=normalisation_table(own["rescale_factor"], own["image_mean"], own["image_std"]),
    )


_RESOLUTION = re.compile(r"square:(?P<side>\d+)|dynamic:(?P<least>\d+)\.\.(?P<most>\d+)")


def _limits(settings: ProcessorConfig, own: Mapping[str, int], unit: int) -> tuple[int, int, int]:
    """The side of squares (0: the aspect is kept), the least and the greatest number of pixels."""
    if settings.resolution is None:
        least = own["shortest_edge"] if settings.min_pixels is None else settings.min_pixels
        return 0, least, own["longest_edge"] if settings.max_pixels is None else settings.max_pixels
    found = _RESOLUTION.fullmatch(settings.resolution)
    if found is None:
        raise ProcessorError(f"resolution is {settings.resolution!r}: give 'square:448' or 'dynamic:4..256'")
    if settings.min_pixels is not None or settings.max_pixels is not None:
        raise ProcessorError(f"resolution is {settings.resolution!r} beside min_pixels or max_pixels: leave these out")
    if found["side"] is None:
        return 0, int(found["least"]) * unit**2, int(found["most"]) * unit**2
    side = int(found["side"])
    if side % unit or not side:
        raise ProcessorError(f"resolution is {settings.resolution!r}: a side is a multiple of {unit} pixels")
    return side, side**2, side**2
