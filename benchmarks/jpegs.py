"""JPEGs of the size that photographs on the web have, made of the embedded pictures; the same ones every time."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import PIL.Image

from cocoa_jax.data.pixels import decode, open_image
from cocoa_jax.data.sources import Content, Image, Record, content_key, image_key, load_pictures

WIDTH, HEIGHT, TILE, QUALITY = 640, 480, 160, 90


def make_jpegs(count: int) -> list[bytes]:
    """``count`` pictures of 640x480, twelve embedded pictures each, enlarged, with a little noise."""
    pictures, rng = load_pictures("train"), np.random.default_rng(0)
    made = []
    for _ in range(count):
        sheet = PIL.Image.new("RGB", (WIDTH, HEIGHT))
        for place, index in enumerate(rng.integers(len(pictures), size=12)):
            tile = decode(pictures[int(index)].image).resize((TILE, TILE))
            sheet.paste(tile, (place % 4 * TILE, place // 4 * TILE))
        # Photographs have grain: without it the codec would have too easy a life.
        grain = np.asarray(sheet, np.int16) + rng.integers(-8, 9, (HEIGHT, WIDTH, 3), dtype=np.int16)
        buffer = io.BytesIO()
        PIL.Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
        made.append(buffer.getvalue())
    return made


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class JpegSource:
    """Picture -> a caption of some words: a `RecordSource`."""

    jpegs: tuple[bytes, ...]
    name: str = "jpegs"

    def __len__(self) -> int:
        return len(self.jpegs)

    def record(self, index: int, rng: np.random.Generator | None = None) -> Record:
        """The pair of one picture."""
        image: Image = open_image(self.jpegs[index], f"jpeg {index}")
        words = Content(f"a picture of twelve things, number {index} of many")
        query = Content("Find an image caption describing the given everyday image.", (image,))
        return Record(f"{index}", self.name, query, words, content_key(words), image_key=image_key(query.images))
