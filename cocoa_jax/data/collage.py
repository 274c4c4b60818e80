"""Tiles and collages of them, for grounding: which part of the picture is the thing that the words name?"""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from PIL import Image as PilImage

from cocoa_jax.data.pixels import decode
from cocoa_jax.data.sources import Image

TILE = 56  # pixels: 2x2 visual tokens


def draw_tile(image: Image) -> PilImage.Image:
    """The picture at the centre of a white square of TILE pixels, its aspect kept; not to be drawn on."""
    tile = _upright(replace(image, mirrored=False))
    return tile.transpose(PilImage.Transpose.FLIP_LEFT_RIGHT) if image.mirrored else tile


@lru_cache(maxsize=8192)  # at most 80 MB in a process; decoding is most of the time that a collage takes
def _upright(image: Image) -> PilImage.Image:
    picture = decode(image)
    scale = TILE / max(picture.size)
    # A box filter is exact for the usual 112 -> 56 and the fastest one.
    small = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), PilImage.Resampling.BOX
    )
    tile = PilImage.new("RGB", (TILE, TILE), "white")
    tile.paste(small, ((TILE - small.width) // 2, (TILE - small.height) // 2))
    return tile


def draw_collage(tiles: Sequence[PilImage.Image]) -> PilImage.Image:
    """Four tiles as a 2x2 picture, row by row."""
    collage = PilImage.new("RGB", (2 * TILE, 2 * TILE))
    for index, tile in enumerate(tiles):
        collage.paste(tile, (index % 2 * TILE, index // 2 * TILE))
    return collage


def encode(picture: PilImage.Image, name: str, file_format: str) -> Image:
    """The picture as bytes, without loss: BMP where it is decoded again at once (0.02 ms), PNG where it is kept."""
    buffer = io.BytesIO()
    picture.save(buffer, file_format)
    return Image(buffer.getvalue(), picture.width, picture.height, name)
