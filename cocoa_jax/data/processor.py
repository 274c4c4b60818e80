"""Content -> Example: tokens, blocks, positions and the pictures that belong to them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from jaxtyping import Bool, Float32, Int8, Int32, UInt8

from cocoa_jax.data.decoded import DecodedPictures
from cocoa_jax.data.pixels import PixelSettings, normalisation_table
from cocoa_jax.data.sources import Image, Video
from cocoa_jax.data.vision_plan import Grid, Positions, VisionPlan, VisionRun, plan_image, token_positions
from cocoa_jax.models.config import Qwen2VLConfig, VisionConfig

if TYPE_CHECKING:
    from cocoa_jax.data.sources import Content

PADDING, BLOCK_A, BRIDGE, BLOCK_B = 0, 1, 2, 3


class ProcessorError(ValueError):
    """The folder's tokenizer or picture settings do not fit the model or the settings."""


class ExampleError(ValueError):
    """A content that cannot become an example."""


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """How contents become tokens.

    Args:
        min_pixels, max_pixels: limits of a resized picture or frame, its aspect kept; None takes the checkpoint's own.
        max_text_tokens: longest text of one block, the rest is cut off.
        positions: ``mrope``, or ``text_1d`` for checkpoints that counted image tokens like text.
        mask_token, bridge_tokens: entries of the checkpoint's tokenizer.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document of a row; n tokens.

    Args:
        tokens: ids, unmasked.
        block: 1 block A, 2 bridge, 3 block B.
        positions: M-RoPE time, height, width, from 0.
        unit: the example's stored visual unit that an image token shows, -1 for text.
        ordinary: text that may be masked; never special, image or bridge tokens.
        images, grids: the pictures and videos in order, not yet patches.
        patches: how many patches they have together.
    """

    tokens: Int32[np.ndarray, " n"]
    block: Int8[np.ndarray, " n"]
    positions: Int32[np.ndarray, "n 3"]
    unit: Int32[np.ndarray, " n"]
    ordinary: Bool[np.ndarray, " n"]
    images: tuple[Image | Video, ...]
    grids: tuple[Grid, ...]
    patches: int


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """The checkpoint's tokenizer and picture settings side by side; picklable, safe to share between threads."""

    config: Qwen2VLConfig
    settings: ProcessorConfig
    text: tokenizers.Tokenizer
    pixels: PixelSettings
    mask_id: int
    bridge_ids: tuple[int, ...]
    decoded: DecodedPictures | None = None

    @classmethod
    def load(
        cls, folder: str | Path, config: Qwen2VLConfig, settings: ProcessorConfig, decoded_mib: int = 0
    ) -> Processor:
        """Read tokenizer and picture settings from a checkpoint's folder.

        Args:
            decoded_mib: MiB of memory in which pictures stay once they are decoded.
        Raises:
            ProcessorError: a file or a token is missing, or the settings contradict the checkpoint.
        """
        # Imported here: worker processes unpickle a Processor without ever needing transformers.
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        if settings.max_text_tokens < 1:
            raise ProcessorError(f"max_text_tokens is {settings.max_text_tokens}, at least 1 is needed: raise it")
        if not Path(folder).is_dir():
            raise ProcessorError(f"{folder} is not a folder: give the folder of a checkpoint")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
            pictures = Qwen2VLImageProcessorPil.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise ProcessorError(
                f"{folder}: no usable tokenizer and preprocessor_config.json ({reason}): copy them from the checkpoint"
            ) from error
        full = tokenizer.backend_tokenizer
        mask_id, bridge_ids = _method_tokens(full, tokenizer.pad_token_id, config, settings)
        pixels = _pixel_settings(pictures, config, settings)
        decoded = DecodedPictures(decoded_mib << 20) if decoded_mib else None
        return cls(config, settings, _without_added_tokens(full), pixels, mask_id, bridge_ids, decoded)

    def warmup(self, content: Content, room: int | None = None) -> Example:
        """Pictures then text, no bridge: a document of stage 1; the text is cut to fit ``room`` tokens."""
        return self._example(content, None, room, with_bridge=False)

    def bridge(self, a: Content, b: Content, room: int | None = None, pictures: bool = False) -> Example:
        """``a``, the bridge tokens and ``b``: a document of stage 2.

        Args:
            pictures: whether ``b`` may hold pictures, with or without text.

        Raises:
            ExampleError: ``b`` has nothing to rebuild, or what is not rebuilt.
        """
        if seen := (0 if pictures else len(b.images)) + len(b.videos):
            how = "drop them, or set masking.image_ratio for pictures"
            raise ExampleError(f"{_name(b)}: block B holds {seen} pictures or videos, only text is rebuilt: {how}")
        return self._example(a, b, room, with_bridge=True)

    def embedding(self, content: Content, room: int | None = None) -> Example:
        """``content`` and the bridge tokens at which it is embedded: a document of stage 3 and of inference."""
        return self._example(content, None, room, with_bridge=True)

    def measure(
        self, a: Content, b: Content | None = None, with_bridge: bool = True, count: Callable[[str], int] | None = None
    ) -> tuple[int, int, int, int]:
        """Tokens, patches, first token that may be hidden and how many may, of the example that these would become.

        ``b`` given is stage 2, no bridge is stage 1, else nothing may be hidden. ``count`` knows the tokens of a text.

        Raises:
            ExampleError, ImageError: they can become none.
        """
        units = [t * h * w // self.config.vision.unit_patches for t, h, w in map(self.pixels.grid, a.images)]
        limit, count = self.settings.max_text_tokens, count or self.count
        shown = min(limit, count(a.text)) if a.text else 0
        rebuilt = min(limit, count(b.text)) if b is not None and b.text else 0
        if b is not None and (b.images or not rebuilt):
            raise ExampleError(f"{_name(b)}: block B is text alone and not empty: leave the record out of stage 2")
        if not units and not shown and not rebuilt:
            raise ExampleError("a content has neither text nor pictures: leave it out")
        pictures = sum(units) + 2 * len(units)
        tokens = pictures + shown + (len(self.bridge_ids) if with_bridge else 0) + rebuilt
        able = (tokens - rebuilt, rebuilt) if b is not None else (0, 0) if with_bridge else (pictures, shown)
        return tokens, sum(units) * self.config.vision.unit_patches, *able

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.token_ids(text))

    def fill_patches(self, example: Example, out: Float32[np.ndarray, "n C"]) -> None:
        """Decode the example's pictures into ``out``, patches in stored order (window order for family 2.5).

        Raises:
            ImageError: a picture cannot be decoded.
        """
        offset = 0
        for image, grid in zip(example.images, example.grids, strict=True):
            place = out[offset : offset + grid[0] * grid[1] * grid[2]]
            windowed = bool(self.config.vision.window)
            read = np.empty_like(place) if windowed else place
            if isinstance(image, Video):
                self.pixels.video_into(image, read)
            else:
                self.pixels.normalise_into(self._patch_bytes(image), read)
            if windowed:
                np.take(read, plan_image(grid, self.config.vision).order, axis=0, out=place)
            offset += len(place)

    def _patch_bytes(self, image: Image) -> UInt8[np.ndarray, "3 n S"]:
        if self.decoded is None:
            return self.pixels.patch_bytes(image)
        return self.decoded.get(image, self.pixels.patch_bytes)

    def fingerprint(self) -> str:
        """Sixteen hex digits over all that tokens and pixels depend on; equal ones make equal examples."""
        pixels = {**vars(self.pixels), "table": self.pixels.table.tobytes().hex()}
        known = [
            self.text.to_str(),
            vars(self.settings),
            pixels,
            self.mask_id,
            self.bridge_ids,
            vars(self.config.vision),
        ]
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def token_ids(self, text: str) -> list[int]:
        """Ids of ``text``; special tokens typed inside it stay ordinary text."""
        ids: list[int] = self.text.encode(text, add_special_tokens=False).ids
        return ids

    def _example(self, a: Content, b: Content | None, room: int | None, with_bridge: bool) -> Example:
        shown, rebuilt = (self._grids(a), self._grids(b) if b is not None else ())
        bridge_ids = self.bridge_ids if with_bridge else ()
        units = [t * h * w // self.config.vision.unit_patches for t, h, w in (*shown, *rebuilt)]
        fixed = sum(units) + 2 * len(units) + len(bridge_ids)
        a_ids = self.token_ids(a.text) if a.text else []
        b_ids = self.token_ids(b.text) if b is not None and b.text else []
        if b is not None and not b_ids and not rebuilt:
            raise ExampleError(f"{_name(a)}: block B has no text, at least one token must be rebuilt: give it a text")
        if not a_ids and not b_ids and not units:
            raise ExampleError("a content has neither text nor pictures: leave it out")
        least = fixed + (1 if b_ids or not units else 0)
        if room is not None and least > room:
            raise ExampleError(
                f"{_name(a)}: pictures and bridge need {least} tokens, a row holds {room}: lower max_pixels"
            )
        limit = self.settings.max_text_tokens
        a_ids, b_ids = _shortened(a_ids[:limit], b_ids[:limit], None if room is None else room - fixed)
        blocks = [_Block(BLOCK_A, (*a.images, *a.videos), shown, a_ids), _Block(BRIDGE, (), (), bridge_ids)]
        return self._laid_out([*blocks, *([] if b is None else [_Block(BLOCK_B, b.images, rebuilt, b_ids)])])

    def _grids(self, content: Content) -> tuple[Grid, ...]:
        return (*map(self.pixels.grid, content.images), *map(self.pixels.video_grid, content.videos))

    def _laid_out(self, blocks: Sequence[_Block]) -> Example:
        config, vision = self.config, self.config.vision
        tokens: list[int] = []
        runs: list[int | VisionRun] = []
        units: list[tuple[int, VisionPlan]] = []  # the first column of each picture
        texts: list[tuple[int, int]] = []  # first column and number, one of each block
        block: list[int] = []
        for part in blocks:
            for image, grid in zip(part.images, part.grids, strict=True):
                plan = plan_image(grid, vision)
                seconds = vision.temporal_patch_size / image.fps if isinstance(image, Video) else None
                shown = [config.image_token if seconds is None else config.video_token] * len(plan.unit_of_token)
                units.append((len(tokens) + 1, plan))
                tokens += [config.vision_start_token, *shown, config.vision_end_token]
                runs += [1, VisionRun(grid, seconds), 1]
            if part.number != BRIDGE:
                texts.append((len(tokens), len(part.ids)))
            tokens += part.ids
            runs.append(len(part.ids))
            block += [part.number] * (len(tokens) - len(block))
        ordinary = np.zeros(len(tokens), bool)
        for first, count in texts:
            ordinary[first : first + count] = True
        return Example(
            tokens=np.array(tokens, np.int32),
            block=np.array(block, np.int8),
            positions=token_positions(runs, vision, self.settings.positions),
            unit=_units(units, len(tokens)),
            ordinary=ordinary,
            images=tuple(image for part in blocks for image in part.images),
            grids=tuple(grid for part in blocks for grid in part.grids),
            patches=sum(len(plan.order) for _, plan in units),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """Pictures and the ids behind them, of block A, the bridge or block B."""

    number: int
    images: tuple[Image | Video, ...]
    grids: tuple[Grid, ...]
    ids: Sequence[int]


def _units(plans: Sequence[tuple[int, VisionPlan]], total: int) -> Int32[np.ndarray, " n"]:
    unit, offset = np.full(total, -1, np.int32), 0
    for column, plan in plans:
        count = len(plan.unit_of_token)
        unit[column : column + count] = plan.unit_of_token + offset
        offset += count
    return unit


def _shortened(a: list[int], b: list[int], room: int | None) -> tuple[list[int], list[int]]:
    """Cut both texts to ``room`` tokens together; neither is cut below half of it while the other is longer."""
    if room is None or len(a) + len(b) <= room:
        return a, b
    keep = min(len(b), max((room + 1) // 2, room - len(a)))
    return a[: room - keep], b[:keep]


def _name(content: Content) -> str:
    seen: tuple[Image | Video, ...] = (*content.images, *content.videos)
    return seen[0].name if seen else f"text {content.text[:40]!r}"


def _without_added_tokens(full: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
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


def _method_tokens(
    full: tokenizers.Tokenizer, pad_id: int | None, config: Qwen2VLConfig, settings: ProcessorConfig
) -> tuple[int, tuple[int, ...]]:
    """Ids of the mask and the bridge tokens, all different and none with another meaning."""
    if not settings.bridge_tokens:
        raise ProcessorError("bridge_tokens is empty: name at least one token, such as '<|im_end|>'")
    taken = {
        pad_id: "the padding token",
        config.image_token: "the image token",
        config.video_token: "the video token",
        config.vision_start_token: "the start of a picture",
        config.vision_end_token: "the end of a picture",
    }
    ids = []
    for role, token in [("mask_token", settings.mask_token), *(("bridge_tokens", t) for t in settings.bridge_tokens)]:
        number = full.token_to_id(token)
        if number is None:
            raise ProcessorError(f"{role} {token!r} is not in the tokenizer: add it in an unused row or name another")
        if number >= config.text.vocab_size:
            raise ProcessorError(
                f"{role} {token!r} has id {number}, the embedding has {config.text.vocab_size} rows: name another token"
            )
        if number in taken:
            raise ProcessorError(f"{role} {token!r} (id {number}) is already {taken[number]}: name another token")
        taken[number] = f"the token {token!r} of {role}"
        ids.append(number)
    return ids[0], tuple(ids[1:])


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


def _pixel_settings(pictures: object, config: Qwen2VLConfig, settings: ProcessorConfig) -> PixelSettings:
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
