"""One shard of prepared data: records read, pictures brought to the working resolution, both written once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Int32

from cocoa_jax.data.bad import BAD
from cocoa_jax.data.masking import Purpose, example_rng
from cocoa_jax.data.pixels import ImageError, PixelSettings, decode
from cocoa_jax.data.prepared import SPLIT, Lengths, serialize
from cocoa_jax.data.processor import ExampleError, Processor
from cocoa_jax.data.readers.records import TableSource
from cocoa_jax.data.readers.stages import Stage, for_stage
from cocoa_jax.data.sources import Content, Image, Record, RecordError

if TYPE_CHECKING:
    from cocoa_jax.data.pairs import RecordSource

PARTS = "parts"  # what each shard found, until all are there
# Pictures are compressed already; one record a chunk is what random access reads fastest.
WRITER_OPTIONS = "group_size:1,uncompressed"
_TEXTS_KNOWN = 1024  # texts of a shard whose tokens are counted once: instructions and classes come again and again
_NONE = (-1, -1, -1, -1)  # a stage has no use for the record
_KEPT = ("JPEG", "PNG", "WEBP")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Work:
    """All that the shards of a data set have in common."""

    source: RecordSource
    processor: Processor
    folder: str
    slug: str
    quality: int
    shard_records: int
    made_for: Literal["", "warmup", "bridge"]

    def path(self, shard: int, shards: int) -> epath.Path:
        """The file of a shard, named as `tensorflow_datasets` expects."""
        return epath.Path(self.folder) / f"{self.slug}-{SPLIT}.array_record-{shard:05d}-of-{shards:05d}"

    def part(self, shard: int) -> epath.Path:
        """The file that says that a shard is whole, and what is in it."""
        return epath.Path(self.folder) / PARTS / f"{shard:05d}.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What one shard found.

    Args:
        seen: records of the source, the rejected ones too.
        digest: over the records' bytes.
        sizes: of each picture: width and height in the source and as stored.
        stamps: of each file of a folder that a picture came from, by its path.
    """

    shard: int
    seen: int
    bytes: int
    digest: str
    rejected: tuple[tuple[int, str], ...]
    lengths: Lengths
    sizes: Int32[np.ndarray, "p 4"]
    stamps: Mapping[str, str]


def write_shard(work: Work, shard: int, shards: int, progress: Callable[[int], object]) -> Part:
    """Write one shard and then its part; either is whole or not there. Other errors than bad records pass."""
    first = shard * work.shard_records
    indices = range(first, min(first + work.shard_records, len(work.source)))
    rows, rejected, sizes = [], [], []
    stamps: dict[str, str] = {}
    digest, total = hashlib.sha256(), 0
    count = functools.lru_cache(_TEXTS_KNOWN)(work.processor.count)
    local = not work.folder.startswith("gs://")
    with tempfile.TemporaryDirectory(dir=epath.Path(work.folder) / PARTS if local else None) as aside:
        path = os.path.join(aside, "shard")
        writer = ArrayRecordWriter(path, WRITER_OPTIONS)
        for index in indices:
            try:
                record, measured, shown = prepare_record(work, index, count)
            except BAD as error:
                rejected.append((index, str(error)))
            else:
                data = serialize(record)
                writer.write(data)
                digest.update(data)
                total += len(data)
                rows.append(measured)
                sizes += shown
                stamps |= _stamps(work.source, record)
            progress(1)
        writer.close()
        _publish(path, work.path(shard, shards))
        table = np.array(sizes, np.int32).reshape(-1, 4)
        part = Part(shard, len(indices), total, digest.hexdigest(), tuple(rejected), _lengths(rows), table, stamps)
        known = {field: getattr(part, field) for field in ("shard", "seen", "bytes", "digest", "rejected")}
        path = os.path.join(aside, "part")
        with open(path, "wb") as file:
            arrays: dict[str, Any] = {"known": np.array(json.dumps(known)), "sizes": table, **part.lengths.arrays()}
            arrays["stamps"] = np.frombuffer(json.dumps(stamps).encode(), np.uint8)
            np.savez(file, **arrays)
        _publish(path, work.part(shard))
    return part


def read_part(work: Work, shard: int) -> Part | None:
    """What an earlier run found in a shard; None where it has to be written, since what it was made of is not the same.

    That is so where a picture was changed, or a record that was rejected can be used now.
    """
    path = work.part(shard)
    if not path.exists():
        return None
    with path.open("rb") as file, np.load(file) as stored:
        arrays = dict(stored)
    known, sizes = json.loads(str(arrays.pop("known"))), arrays.pop("sizes")
    stamps = json.loads(arrays.pop("stamps").tobytes())
    known["rejected"] = tuple((index, reason) for index, reason in known["rejected"])
    if changed_pictures(work.source, stamps) or any(usable(work, index) for index, _ in known["rejected"]):
        return None
    return Part(**known, lengths=Lengths(**arrays), sizes=sizes, stamps=stamps)


def changed_pictures(source: RecordSource, stamps: Mapping[str, str]) -> list[str]:
    """The paths whose files are others now; one that is gone has not changed what was made of it."""
    if not isinstance(source, TableSource) or source.images is None:
        return []
    now = ((path, source.images.stamp(path)) for path in stamps)
    return [path for path, stamp in now if stamp.strip() and stamp != stamps[path]]


def usable(work: Work, index: int) -> bool:
    """Whether a record that was rejected can be used now."""
    try:
        prepare_record(work, index, work.processor.count)
    except BAD:
        return False
    return True


def _stamps(source: RecordSource, record: Record) -> dict[str, str]:
    """Of the pictures that lie in folders; those of zips and inside tables are part of the source's fingerprint."""
    if not isinstance(source, TableSource) or source.images is None:
        return {}
    contents = (record.query, record.target, *record.negatives)
    # A picture that was read by its path is called by it; another one's name is no path, and has no stamp.
    stamps = {image.name: source.images.stamp(image.name) for content in contents for image in content.images}
    return {path: stamp for path, stamp in stamps.items() if stamp.strip()}


Measured = tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]], list[int]]
"""Of one record: warm-up, bridge, query and target; wrong targets; hashes of all keys."""


def prepare_record(
    work: Work, index: int, count: Callable[[str], int]
) -> tuple[Record, Measured, list[tuple[int, int, int, int]]]:
    """A record with its pictures as they are stored, what rows are planned from, and the sizes of its pictures.

    Raises:
        RecordError, ImageError, ExampleError: it cannot be used, by no stage at all.
    """
    record = work.source.record(index, example_rng(0, 0, index, Purpose.RECORD))
    if any(content.videos for content in (record.query, record.target, *record.negatives)):
        raise RecordError(f"{record.dataset} {record.id}: videos are not prepared: train on their data set itself")
    done: dict[int, Image] = {}
    sizes = []

    def stored(content: Content) -> Content:
        images = []
        for image in content.images:
            if id(image) not in done:  # a picture may stand on both sides
                try:
                    done[id(image)] = working_picture(image, work.processor.pixels, work.quality)
                except ImageError as error:
                    raise ImageError(f"{record.dataset} {record.id}: {error}") from error
            images.append(done[id(image)])
            sizes.append((image.width, image.height, images[-1].width, images[-1].height))
        return dataclasses.replace(content, images=tuple(images))

    small = dataclasses.replace(
        record,
        query=stored(record.query),
        target=stored(record.target),
        negatives=tuple(map(stored, record.negatives)),
        negative_keys=record.wrong_keys(),
    )
    keys = [small.target_key, small.image_key, *small.negative_keys]
    return small, (*_measured(small, work.processor, work.made_for, count), list(map(_hash, keys))), sizes


def working_picture(image: Image, pixels: PixelSettings, quality: int) -> Image:
    """``image`` about as large as the model sees it; one within the limits keeps its pixels, and mostly its bytes.

    Raises:
        ImageError: it cannot be decoded.
    """
    picture = decode(image)
    width, height = _size_kept(image, pixels, exact=not quality)
    buffer = io.BytesIO()
    if (width, height) != picture.size:
        picture = picture.resize((width, height), PIL.Image.Resampling(pixels.resample))
        if quality:
            picture.save(buffer, "JPEG", quality=quality)
            return Image(buffer.getvalue(), width, height, image.name)
    else:
        with PIL.Image.open(io.BytesIO(image.data)) as opened:
            if opened.format in _KEPT and not image.mirrored and not getattr(opened, "is_animated", False):
                return image
    picture.save(buffer, "PNG")
    return Image(buffer.getvalue(), picture.width, picture.height, image.name)


def _size_kept(image: Image, pixels: PixelSettings, *, exact: bool) -> tuple[int, int]:
    """Width and height of a picture that the model sees at the same size as ``image``; its own within the limits.

    The size at which it is seen itself does not always do: the reference rounds down to the most pixels, perhaps below
    the least, and what is one unit high may still be beyond the limits. Then it is its own shape at twice the most
    pixels, unless what the model sees must be ``exact``, which two resizes are not.
    """
    own = image.width, image.height
    if image.width * image.height <= pixels.max_pixels:
        return own
    grid = pixels.grid(image)
    scale = math.sqrt(2 * pixels.max_pixels / (image.width * image.height))
    seen = grid[2] * pixels.patch_size, grid[1] * pixels.patch_size
    shape = round(image.width * scale), round(image.height * scale)
    for size in (seen,) if exact or scale >= 1 else (seen, shape):
        try:
            if pixels.grid(Image(b"", *size, image.name)) == grid:
                return size
        except ImageError:  # too thin
            continue
    return own


def _measured(
    record: Record, processor: Processor, made_for: str, count: Callable[[str], int]
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]:
    found = []
    why = ""
    for stage in ("warmup", "bridge"):
        try:
            found.append(_staged(record, processor, stage, made_for == stage, count))
        except (RecordError, ExampleError) as error:
            if made_for == stage:
                raise
            found.append(_NONE)
            why = str(error)
    try:
        found += [processor.measure(content, count=count) for content in (record.query, record.target)]
        wrong = [processor.measure(content, count=count) for content in record.negatives]
    except ExampleError as error:
        found, wrong, why = [*found[:2], _NONE, _NONE], [], str(error)
    if all(entry == _NONE for entry in found):
        raise ExampleError(f"{record.dataset} {record.id}: of no use to any stage ({why}): leave it out")
    return found, wrong


def _staged(
    record: Record, processor: Processor, stage: Stage, ready: bool, count: Callable[[str], int]
) -> tuple[int, int, int, int]:
    staged = record if ready else for_stage(record, stage)
    if stage == "warmup":
        return processor.measure(staged.query, with_bridge=False, count=count)
    return processor.measure(staged.query, staged.target, count=count)


def _lengths(rows: list[Measured]) -> Lengths:
    single = np.array([row[0] for row in rows], np.int32).reshape(-1, 4, 4)
    return Lengths(
        warmup=single[:, 0],
        bridge=single[:, 1],
        contrastive=single[:, 2:],
        negatives=np.array([entry for row in rows for entry in row[1]], np.int32).reshape(-1, 4),
        negative_count=np.array([len(row[1]) for row in rows], np.int32),
        keys=np.array([row[2][:2] for row in rows], np.uint64).reshape(-1, 2),
        negative_keys=np.array([key for row in rows for key in row[2][2 : 2 + len(row[1])]], np.uint64),
    )


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") if key else 0


def _publish(path: str, target: epath.Path) -> None:
    """Put a finished file where it belongs, whole or not at all: a store of objects shows no part of one."""
    if str(target).startswith("gs://"):
        epath.Path(path).copy(target, overwrite=True)
    else:
        os.replace(path, target)
