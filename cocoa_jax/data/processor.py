"""Content -> Example: tokens, blocks, positions and the pictures that belong to them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from jaxtyping import Float32, UInt8

from cocoa_jax.data.decoded import DecodedPictures
from cocoa_jax.data.example import BLOCK_A, BLOCK_B, BRIDGE, Block, Example, lay_out
from cocoa_jax.data.pixels import PixelSettings
from cocoa_jax.data.processor_settings import (
    ProcessorConfig,
    ProcessorError,
    method_tokens,
    pixel_settings,
    without_added_tokens,
)
from cocoa_jax.data.sources import Image, Video
from cocoa_jax.data.vision_plan import Grid, plan_image
from cocoa_jax.models.config import Qwen2VLConfig

if TYPE_CHECKING:
    from cocoa_jax.data.sources import Content


class ExampleError(ValueError):
    """A content that cannot become an example."""


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """The checkpoint's tokenizer and picture settings side by side; picklable, safe to share between threads.

    Args:
        added, used_rows: see ``MethodTokens``.
    """

    config: Qwen2VLConfig
    settings: ProcessorConfig
    text: tokenizers.Tokenizer
    pixels: PixelSettings
    mask_id: int
    bridge_ids: tuple[int, ...]
    added: Mapping[str, int] = dataclasses.field(default_factory=dict)
    used_rows: int = 0
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
        tokens = method_tokens(full, tokenizer.pad_token_id, config, settings)
        pixels = pixel_settings(pictures, config, settings)
        decoded = DecodedPictures(decoded_mib << 20) if decoded_mib else None
        plain = without_added_tokens(full)
        return cls(config, settings, plain, pixels, **dataclasses.asdict(tokens), decoded=decoded)

    @property
    def lacking_bridge(self) -> dict[str, int]:
        """The bridge tokens that the tokenizer does not have, by name, and the rows that they take."""
        return {name: row for name, row in self.added.items() if name in self.settings.bridge_tokens}

    def require_bridge(self, folder: str | Path) -> None:
        """See that ``folder`` can be embedded with: only training gives a new bridge token a meaning.

        Raises:
            ProcessorError: its tokenizer lacks a bridge token.
        """
        if lacking := list(self.lacking_bridge):
            raise ProcessorError(
                f"{folder}: its tokenizer lacks {lacking} of bridge_tokens: name those of its training"
            )

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
        blocks = [Block(BLOCK_A, (*a.images, *a.videos), shown, a_ids), Block(BRIDGE, (), (), bridge_ids)]
        if b is not None:
            blocks.append(Block(BLOCK_B, b.images, rebuilt, b_ids))
        return lay_out(blocks, self.config, self.settings.positions)

    def _grids(self, content: Content) -> tuple[Grid, ...]:
        return (*map(self.pixels.grid, content.images), *map(self.pixels.video_grid, content.videos))


def _shortened(a: list[int], b: list[int], room: int | None) -> tuple[list[int], list[int]]:
    """Cut both texts to ``room`` tokens together; neither is cut below half of it while the other is longer."""
    if room is None or len(a) + len(b) <= room:
        return a, b
    keep = min(len(b), max((room + 1) // 2, room - len(a)))
    return a[: room - keep], b[:keep]


def _name(content: Content) -> str:
    seen: tuple[Image | Video, ...] = (*content.images, *content.videos)
    return seen[0].name if seen else f"text {content.text[:40]!r}"
