"""`cocoa data build`: any source of records -> prepared data, shard by shard, in parallel and resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from etils import epath
from tqdm import tqdm

from cocoa_jax.data.bad import BadConfig, TooManyBad
from cocoa_jax.data.pairs import PictureSource, RecordSource
from cocoa_jax.data.prepare_shard import PARTS, Part, Work, changed_pictures, read_part, usable
from cocoa_jax.data.prepare_workers import run_shards
from cocoa_jax.data.prepared import (
    FORMAT,
    LENGTHS,
    REJECTED,
    SPLIT,
    STATISTICS,
    Lengths,
    PreparedSource,
    features,
    open_prepared,
)
from cocoa_jax.data.readers.tfds import TfdsSource

if TYPE_CHECKING:
    from cocoa_jax.data.processor import Processor

VERSION = "1.0.0"
PLAN = "plan.json"
STAMPS = "stamps.json"  # of the pictures that were read from folders, by path


class PrepareError(ValueError):
    """A build that cannot begin, or that began with other settings."""


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """How prepared data are written.

    Args:
        quality: of JPEG for pictures that had to be made smaller, 1 to 100; 0 writes PNG, which loses nothing.
        shard_records: records of a file; what is done again at most when a build is killed.
        workers: processes; 0 for none beside this one.
        bad: what happens to a record that cannot be used.
    """

    quality: int = 95
    shard_records: int = 1000
    workers: int = 1
    bad: BadConfig = BadConfig("skip")  # noqa: RUF009

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 100 or self.shard_records < 1 or self.workers < 0:
            raise PrepareError(f"{self}: quality is 0 to 100, shard_records at least 1, workers at least 0: correct it")


def build(
    name: str,
    source: RecordSource,
    contents: str,
    processor: Processor,
    output: str,
    config: BuildConfig,
    made_for: Literal["", "warmup", "bridge"] = "",
) -> PreparedSource:
    """Write the records of ``source`` to ``output/name``, or finish what was begun there; returns what was written.

    Args:
        contents: a fingerprint of what the source holds.
        output: a local folder or ``gs://``.
        made_for: a stage for which the records are made already.
    Raises:
        PrepareError: the folder was begun with other data or settings, or finished and its pictures have changed since;
            or there are no records to write.
        TooManyBad: more records cannot be used than ``config.bad`` allows; RecordError: one, and it says stop.
    """
    folder = epath.Path(output) / _slug(name) / VERSION
    shards = -(-len(source) // config.shard_records)
    plan = {
        "format": FORMAT,
        "name": name,
        "contents": contents,
        "records": len(source),
        "processor": processor.fingerprint(),
        "quality": config.quality,
        "shard_records": config.shard_records,
        "made_for": made_for,
    }
    _begin(folder, plan)
    work = Work(source, processor, str(folder), _slug(name), config.quality, config.shard_records, made_for)
    if _finished(folder):
        _check_unchanged(folder, work)
    else:
        parts = _written(work, shards, config)
        _finish(folder, work, shards, parts, plan)
    return open_prepared(str(folder), name)


def _begin(folder: epath.Path, plan: Mapping[str, Any]) -> None:
    """Note what is built here, or see that it is the same as what was begun."""
    if not plan["records"]:
        raise PrepareError(f"data set {plan['name']} has no records: leave it out")
    path = folder / PLAN
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(plan, indent=1))
        return
    try:
        begun = json.loads(path.read_text())
    except ValueError:  # killed while it was written: nothing else is there
        path.write_text(json.dumps(plan, indent=1))
        return
    changed = [f"{key}: {begun.get(key)!r}, {plan[key]!r}" for key in plan if begun.get(key) != plan[key]]
    if changed:
        raise PrepareError(
            f"{folder} was begun with other data or settings ({'; '.join(changed)}): give another output or remove it"
        )


def _finished(folder: epath.Path) -> bool:
    """Whether the last file of a build is there, and whole."""
    try:
        json.loads((folder / STATISTICS).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _check_unchanged(folder: epath.Path, work: Work) -> None:
    """See that finished data are what a build of the same source would give now."""
    stamps = json.loads((folder / STAMPS).read_text()) if (folder / STAMPS).exists() else {}
    if changed := changed_pictures(work.source, stamps):
        raise PrepareError(
            f"{folder} was built from other pictures ({len(changed)} of {len(stamps)} have changed since, the first: "
            f"{changed[0]!r}): give another output or remove it"
        )
    rejected = [json.loads(line)["index"] for line in (folder / REJECTED).read_text().splitlines()]
    if repaired := [index for index in rejected if usable(work, index)]:
        raise PrepareError(
            f"{folder} was built without records that can be used now ({len(repaired)}, the first is number "
            f"{repaired[0]}): give another output or remove it"
        )


def _written(work: Work, shards: int, config: BuildConfig) -> list[Part]:
    """Every shard, those of an earlier run too."""
    parts: dict[int, Part] = {}
    for shard in range(shards):
        if (part := read_part(work, shard)) is not None:
            parts[shard] = part
    todo = [shard for shard in range(shards) if shard not in parts]
    with tqdm(
        total=len(work.source), desc=work.slug, unit="record", initial=sum(p.seen for p in parts.values())
    ) as bar:
        for done in run_shards(work, shards, todo, config.workers):
            if isinstance(done, int):
                bar.update(done)
                continue
            parts[done.shard] = done
            _check_ceiling(parts.values(), config.bad)
    _check_ceiling(parts.values(), config.bad)
    return [parts[shard] for shard in range(shards)]


def _check_ceiling(parts: Any, config: BadConfig) -> None:
    rejected = [reason for part in parts for _, reason in part.rejected]
    seen = sum(part.seen for part in parts)
    ceiling = 0.0 if config.action == "stop" else config.ceiling * max(seen, 1000)
    if len(rejected) > ceiling:
        raise TooManyBad(
            f"{len(rejected)} of {seen} records cannot be used, the first: {rejected[0]}: repair the data, or set "
            "bad.action to skip and raise bad.ceiling"
        )


def _finish(folder: epath.Path, work: Work, shards: int, parts: Sequence[Part], plan: Mapping[str, Any]) -> None:
    """Metadata, lengths and statistics; the last of them says that all is there."""
    import tensorflow_datasets as tfds

    counts = [part.seen - len(part.rejected) for part in parts]
    if not sum(counts):
        reason = next(reason for part in parts for _, reason in part.rejected)
        raise PrepareError(
            f"data set {plan['name']}: none of {plan['records']} records can be used, the first: {reason}"
        )
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=work.slug, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=counts, num_bytes=sum(part.bytes for part in parts), filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(),
        split_infos=[split],
        version=VERSION,
        check_data=False,  # the check would import TensorFlow
        description=f"Records of {plan['name']}, prepared by cocoa_jax.",
    )
    lengths = Lengths.joined([part.lengths for part in parts])
    with (folder / LENGTHS).open("wb") as file:
        np.savez(file, **lengths.arrays())  # type: ignore[arg-type]
    rejected = [(index, reason) for part in parts for index, reason in part.rejected]
    lines = [json.dumps({"index": index, "reason": reason}) + "\n" for index, reason in rejected]
    (folder / REJECTED).write_text("".join(lines))
    stamps = {path: stamp for part in parts for path, stamp in part.stamps.items()}
    (folder / STAMPS).write_text(json.dumps(stamps))
    digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()[:16]
    statistics = {
        **plan,
        "source_records": plan["records"],
        "max_pixels": work.processor.pixels.max_pixels,
        "records": sum(counts),
        "fingerprint": digest,
        "rejected": dict(Counter(_kind(reason) for _, reason in rejected).most_common(50)),
        "bytes": sum(part.bytes for part in parts),
        "pictures": _pictures(parts),
        "tokens": {stage: _spread(values) for stage, values in _lengths_by_stage(lengths, 0)},
        "patches": {stage: _spread(values) for stage, values in _lengths_by_stage(lengths, 1)},
    }
    _write_whole(folder / STATISTICS, json.dumps(statistics, indent=1))
    (folder / PARTS).rmtree()


def _write_whole(path: epath.Path, text: str) -> None:
    """Write a file whole or not at all, as a store of objects does by itself."""
    if str(path).startswith("gs://"):
        path.write_text(text)
        return
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)


def summary(made: PreparedSource) -> str:
    """One line about what was written, and one for each reason of rejection."""
    known = made.statistics
    pixels = known["pictures"]
    line = (
        f"{made.folder}: {known['records']} of {known['source_records']} records, {pixels['count']} pictures, "
        f"{known['bytes'] / 1e6:.1f} MB, fingerprint {known['fingerprint']}"
    )
    return "\n".join([line, *(f"  {count} rejected: {reason}" for reason, count in known["rejected"].items())])


def drawn_once(source: RecordSource) -> str:
    """In words, what training would draw anew each time and prepared data keep as it was drawn once; "" for nothing."""
    if isinstance(source, PictureSource):
        return f"{source.name}: words and flips are drawn once here, at every visit when training on the pictures"
    if isinstance(source, TfdsSource) and not source.labels:
        return f"{source.name}: of several captions one is drawn and kept, a training on the data set itself sees all"
    return ""


def _lengths_by_stage(lengths: Lengths, column: int) -> Iterator[tuple[str, np.ndarray]]:
    both = np.concatenate([lengths.contrastive.reshape(-1, 4), lengths.negatives])
    for stage, table in (("warmup", lengths.warmup), ("bridge", lengths.bridge), ("contrastive", both)):
        yield stage, table[table[:, 0] >= 0, column]


def _pictures(parts: Sequence[Part]) -> dict[str, Any]:
    sizes = np.concatenate([part.sizes for part in parts])
    pixels = {"source": sizes[:, 0] * sizes[:, 1], "stored": sizes[:, 2] * sizes[:, 3]}
    aspects = sizes[:, 0] / np.maximum(sizes[:, 1], 1)
    return {"count": len(sizes), **{k: _spread(v) for k, v in pixels.items()}, "aspect": _spread(aspects)}


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"count": 0}
    points = {name: round(float(np.percentile(values, q)), 3) for name, q in (("p5", 5), ("p50", 50), ("p95", 95))}
    ends = {"least": float(values.min()), "most": float(values.max()), "mean": round(float(values.mean()), 3)}
    return {"count": len(values), **ends, **points}


def _kind(reason: str) -> str:
    """A reason without names and numbers; names come first, each before a colon, and are seldom three words."""
    parts = reason.split(": ")
    while len(parts) > 1 and len(parts[0].split()) < 3:
        parts.pop(0)
    words = re.sub(r"b?'[^']*'|b?\"[^\"]*\"", "'...'", ": ".join(parts))
    return re.sub(r"\d+", "#", words)[:160]


def _slug(name: str) -> str:
    """A name as `tensorflow_datasets` takes it."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return slug if slug[:1].isalpha() else f"set_{slug}"
