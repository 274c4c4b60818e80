"""Picture bytes -> normalised patches, bit for bit as transformers' Qwen2VLImageProcessorPil makes them."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float32, UInt8

from cocoa_jax.data.sources import Image, Video
from cocoa_jax.data.vision_plan import Grid

_MOST_PIXELS = 178_956_970  # Pillow's own line between a large picture and a decompression bomb
_MOST_ELONGATED = 200
# Named, because Pillow asks every plugin otherwise, whatever a file is called: PostScript runs in an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
_SWAPPING = (5, 6, 7, 8)  # orientations of EXIF that exchange width and height; what is not from 1 to 8 turns nothing


class ImageError(ValueError):
    """A picture that cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True, eq=False)
class PixelSettings:
    """Sizes and normalisation of a checkpoint's pictures.

    Args:
        square: pixels of the side that every picture is squashed to; 0 keeps the aspect.
        table: float32 [3, 256], the normalised value of each byte of each colour.
        resample: a Pillow resampling filter.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    resample: int
    table: Float32[np.ndarray, "3 256"]
    square: int = 0

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, image: Image) -> Grid:
        """The grid of patches that ``image`` becomes, from its width and height alone.

        Raises:
            ImageError: an impossible, a too large or a too elongated picture.
        """
        width, height = image.width, image.height
        if min(width, height) < 1 or width * height > _MOST_PIXELS:
            raise ImageError(f"{image.name}: {width}x{height} pixels, allowed are 1 to {_MOST_PIXELS}: leave it out")
        if max(width, height) > _MOST_ELONGATED * min(width, height):
            raise ImageError(f"{image.name}: {width}x{height} is longer than {_MOST_ELONGATED}:1: crop it")
        rows, columns = self._resized(height, width)
        return 1, rows // self.patch_size, columns // self.patch_size

    def video_grid(self, video: Video) -> Grid:
        """The grid of patches that ``video`` becomes; its last frame is repeated where a slice lacks frames.

        Raises:
            ImageError: no frames, frames of another form, no frame rate, or frames of an impossible size.
        """
        frames = video.frames
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise ImageError(
                f"{video.name}: frames are {frames.dtype} {frames.shape}, expected uint8 [F, H, W, 3] with at least "
                "one frame: decode it to RGB"
            )
        if not 0 < video.fps < math.inf:
            raise ImageError(f"{video.name}: {video.fps} frames a second: give the rate at which frames were taken")
        _, rows, columns = self.grid(Image(b"", frames.shape[2], frames.shape[1], video.name))
        return -(-len(frames) // self.temporal_patch_size), rows, columns

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: whole units, the aspect kept, inside the limits (``smart_resize``)."""
        if self.square:
            return self.square, self.square
        unit = self.patch_size * self.merge_size
        # Python's round() takes halves to the even unit, and so does the reference.
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
        elif rows * columns * unit**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
        return rows * unit, columns * unit

    def patches(self, image: Image) -> Float32[np.ndarray, "n C"]:
        """Decode ``image`` into normalised patches, the patches of a unit side by side (the reference's order).

        Raises:
            ImageError: the bytes are no picture, or one of another size than they claimed.
        """
        bytes_ = self.patch_bytes(image)
        out = np.empty((bytes_.shape[1], self.patch_values), np.float32)
        self.normalise_into(bytes_, out)
        return out

    def patch_bytes(self, image: Image) -> UInt8[np.ndarray, "3 n S"]:
        """Decode ``image`` into the bytes of each colour of each patch.

        Raises:
            ImageError: the bytes are no picture, or one of another size than they claimed.
        """
        _, rows, columns = self.grid(image)
        return self._bytes(decode(image), rows, columns)

    def normalise_into(self, bytes_: UInt8[np.ndarray, "3 n S"], out: Float32[np.ndarray, "n C"]) -> None:
        """Patches of ``patch_bytes``, normalised, written into ``out``, whose rows must be contiguous."""
        target = out.reshape(bytes_.shape[1], 3, self.temporal_patch_size, self.patch_size**2)
        for colour in range(3):
            # A still picture is the same slice repeated.
            target[:, colour] = self.table[colour].take(bytes_[colour])[:, None]

    def video_into(self, video: Video, out: Float32[np.ndarray, "n C"]) -> None:
        """Normalised patches of a video, slice after slice, written into ``out``, whose rows must be contiguous."""
        slices, rows, columns = self.video_grid(video)
        target = out.reshape(slices, rows * columns, 3, self.temporal_patch_size, self.patch_size**2)
        for step in range(slices * self.temporal_patch_size):
            frame = PIL.Image.fromarray(video.frames[min(step, len(video.frames) - 1)])
            bytes_ = self._bytes(frame, rows, columns)
            place = target[step // self.temporal_patch_size, :, :, step % self.temporal_patch_size]
            for colour in range(3):
                place[:, colour] = self.table[colour].take(bytes_[colour])

    def _bytes(self, picture: PIL.Image.Image, rows: int, columns: int) -> UInt8[np.ndarray, "3 n S"]:
        """The bytes of each colour of each patch, the patches of a unit side by side."""
        size, merge = self.patch_size, self.merge_size
        if picture.size != (columns * size, rows * size):
            picture = picture.resize((columns * size, rows * size), PIL.Image.Resampling(self.resample))
        blocks = np.asarray(picture).reshape(rows // merge, merge, size, columns // merge, merge, size, 3)
        return blocks.transpose(6, 0, 3, 1, 4, 2, 5).reshape(3, rows * columns, size * size)


def decode(image: Image) -> PIL.Image.Image:
    """The picture as RGB on white, turned upright by its EXIF orientation, mirrored if the image asks for it.

    Raises:
        ImageError: unreadable bytes, or a size other than ``image.width`` x ``image.height``.
    """
    try:
        with PIL.Image.open(io.BytesIO(image.data), formats=_FORMATS) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise ImageError(f"{image.name}: {opened.width}x{opened.height} pixels: leave it out")
            turned = opened.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
            picture = _on_white(PIL.ImageOps.exif_transpose(opened) if turned else opened)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on broken bytes
        reason = _reason(error, image.data)
        raise ImageError(f"{image.name}: cannot be decoded ({reason}): replace it or leave it out") from error
    if picture.size != (image.width, image.height):
        raise ImageError(
            f"{image.name}: decodes to {picture.width}x{picture.height}, announced were {image.width}x{image.height}: "
            "record its upright size again"
        )
    return PIL.ImageOps.mirror(picture) if image.mirrored else picture


def _on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        picture.load()
        return picture
    if "A" in picture.getbands() or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def normalisation_table(scale: float, mean: Sequence[float], std: Sequence[float]) -> Float32[np.ndarray, "3 256"]:
    """What rescaling and normalising do to each byte, with the reference's roundings.

    The reference scales in float64, rounds to float32, then subtracts and divides in float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    return (scaled[None] - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def open_image(data: bytes, name: str) -> Image:
    """An image from encoded bytes, measured upright; nothing is decoded yet.

    Raises:
        ImageError: bytes of no format that is read (``_FORMATS``), or samples of more than 8 bits in grey.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            (width, height), mode = opened.size, opened.mode
            # A TIFF tells its upright size. For the orientation of a PNG Pillow decodes it whole, so only one that can
            # have any is asked.
            told = opened.format != "TIFF"
            if opened.format == "PNG":
                told = any(mark in data for mark in (b"eXIf", b"exif", b"adobe.xmp"))
            if told and width * height <= _MOST_PIXELS:
                turned = opened.getexif().get(PIL.ExifTags.Base.Orientation) in _SWAPPING
                width, height = (height, width) if turned else (width, height)
    except Exception as error:  # Pillow's decoders raise almost anything on broken bytes
        raise ImageError(f"{name}: cannot be decoded ({_reason(error, data)})") from error
    if mode.startswith(("I", "F")):
        # Pillow, and with it every published processor, cuts these off at 255: nearly all of the picture turns white.
        raise ImageError(f"{name}: grey of more than 8 bits (mode {mode}) would turn white: store it with 8 bits")
    if width * height > _MOST_PIXELS:
        raise ImageError(f"{name}: {width}x{height} pixels, allowed are 1 to {_MOST_PIXELS}: leave it out")
    return Image(data, width, height, name)


def _reason(error: Exception, data: bytes) -> str:
    """What was wrong, the same words every time: Pillow names the address of the buffer in memory."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"{len(data)} bytes that begin with {data[:12]!r} are no picture" if data else "zero bytes"
    return str(error).replace("\n", " ") or type(error).__name__
