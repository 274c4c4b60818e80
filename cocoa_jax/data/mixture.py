"""A mixture: which data sets a stage draws from, how much of each, and what identifies all of it."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from cocoa_jax.data.pairs import KINDS, RecordSource, picture_source
from cocoa_jax.data.prepared import PreparedSource, open_prepared
from cocoa_jax.data.readers.mmeb import mmeb_eval, mmeb_train
from cocoa_jax.data.readers.records import Columns, TableSource
from cocoa_jax.data.readers.stages import Stage, StagedSource
from cocoa_jax.data.readers.stores import PictureStore, open_store
from cocoa_jax.data.readers.tables import open_table
from cocoa_jax.data.readers.tfds import open_tfds
from cocoa_jax.data.sources import Record, SourceError, load_pictures

Format = Literal["mmeb-train", "mmeb-eval", "cocoa-captions", "cocoa-pairs", "table", "pictures", "tfds", "prepared"]
STAGES: tuple[Stage, ...] = ("warmup", "bridge", "contrastive")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One data set.

    Args:
        format: ``mmeb-train`` and ``mmeb-eval`` as published; ``cocoa-captions`` (image_path, caption) and
            ``cocoa-pairs`` (qry, pos_text, qry_image_path), the method's own lists; ``table``, JSON or Parquet of
            other ``columns``; ``pictures``, the embedded ones; ``tfds``, the folder of a version that TensorFlow
            Datasets prepared as ArrayRecord; ``prepared``, one that ``cocoa data build`` made.
        path: a folder (MMEB) or files, ``*`` allowed; relative to the mixture's ``root``.
        images: folder or zip of the pictures, or several; default where the format keeps them, else beside the files,
            which must lie in one folder then.
        subset, split: of MMEB, or the split of the embedded pictures; default the data set's name, and the first.
        kind: of the embedded pictures.
        columns: of a ``table``.
        weight: how often it is drawn; default the number of its records. All data sets have one or none has.
        cap: at most so many records, chosen once at random.
        stages: that draw from it.
        instruction: in place of every query's own; ``{text}`` in it is the place of the words.
    """

    format: Format
    path: str = ""
    images: list[str] = dataclasses.field(default_factory=list)
    subset: str = ""
    split: str = ""
    kind: str = ""
    columns: Columns | None = None
    weight: float | None = None
    cap: int | None = None
    stages: list[Stage] = dataclasses.field(default_factory=lambda: list(STAGES))
    instruction: str = ""

    def __post_init__(self) -> None:
        if (self.format == "table") != (self.columns is not None):
            raise ValueError(f"format is {self.format!r}: `columns` belong to format 'table' and to no other")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"cap is {self.cap}: it starts at 1, or leave the data set out")
        places = [*self.images] if self.format in ("prepared", "tfds") else [self.path, *self.images]
        if remote := [place for place in places if place.startswith("gs://")]:
            raise ValueError(
                f"{remote[0]} is in a bucket, from which format {self.format!r} reads nothing: copy it to this machine "
                "(`gcloud storage cp -r`), or put there what `cocoa data build` makes of it"
            )


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Data sets by name; ``root`` is where relative paths begin, by default the folder of the mixture's file."""

    datasets: dict[str, DatasetConfig]
    root: str = ""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What a stage draws from, opened.

    Args:
        identity: plain values that name contents and settings; equal mixtures are the same data.
    """

    sources: Mapping[str, RecordSource]
    weights: Mapping[str, float]
    identity: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over contents and settings."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CappedSource:
    """Some records of a source."""

    source: RecordSource
    kept: Int64[np.ndarray, " n"]

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.kept)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """The record at ``index`` of those that were kept."""
        return self.source.record(int(self.kept[index]), rng)


@dataclasses.dataclass(frozen=True)
class NamedSource:
    """A source under the name that the mixture gives it."""

    name: str
    source: RecordSource

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """The record at ``index``, said to be of this data set."""
        return dataclasses.replace(self.source.record(index, rng), dataset=self.name)


def with_negatives(source: RecordSource, most: int) -> RecordSource:
    """``source`` without the wrong targets that nobody asks for: reading them takes time, and they may be bad."""
    if isinstance(source, CappedSource | NamedSource | StagedSource):
        return dataclasses.replace(source, source=with_negatives(source.source, most))
    return source.with_negatives(most) if isinstance(source, TableSource) else source


def open_mixture(config: MixtureConfig, stage: Stage) -> Mixture:
    """The data sets that ``stage`` draws from.

    Raises:
        SourceError: a data set that cannot be opened, or none for the stage; ValueError: weights for some only.
    """
    chosen = {name: dataset for name, dataset in config.datasets.items() if stage in dataset.stages}
    if not chosen:
        raise SourceError(f"the mixture has no data set for stage {stage!r}: add it to a data set's `stages`")
    weighted = sorted(name for name, dataset in chosen.items() if dataset.weight is not None)
    if weighted and len(weighted) < len(chosen):
        raise ValueError(f"{weighted} have a weight, {sorted(set(chosen) - set(weighted))} none: give all or none one")
    sources: dict[str, RecordSource] = {}
    identity: dict[str, Any] = {}
    for name, dataset in chosen.items():
        source, contents = open_dataset(name, dataset, Path(config.root))
        staged = "contrastive" if made_for(dataset, source) else stage  # which leaves records as they are
        source = StagedSource(_capped(source, dataset.cap, name), staged)
        sources[name] = NamedSource(name, source)
        settings = dataclasses.asdict(dataset)
        identity[name] = {"settings": settings, "contents": contents, "records": len(source)}
    weights = {name: len(sources[name]) if d.weight is None else d.weight for name, d in chosen.items()}
    return Mixture(sources, weights, {"stage": stage, "datasets": json.loads(json.dumps(identity))})


def open_dataset(name: str, dataset: DatasetConfig, root: Path) -> tuple[RecordSource, str]:
    """One data set whole, as pairs, and the fingerprint of its contents.

    Raises:
        SourceError: it cannot be opened.
    """
    try:
        return _OPENERS[dataset.format](name, dataset, root)
    except SourceError as error:
        raise SourceError(f"data set {name}: {error}") from error


def made_for(dataset: DatasetConfig, source: RecordSource) -> Literal["", "warmup", "bridge"]:
    """The stage for which the records of an opened data set are made already, "" for pairs."""
    if dataset.format == "pictures":
        return KINDS[dataset.kind].made_for
    return source.made_for if isinstance(source, PreparedSource) else ""  # type: ignore[return-value]


def _capped(source: RecordSource, cap: int | None, name: str) -> RecordSource:
    if cap is None or cap >= len(source):
        return source
    # By the data set's name alone: another seed of a run draws from the same records.
    kept = np.random.default_rng(zlib.crc32(name.encode())).choice(len(source), cap, replace=False)
    return CappedSource(source, np.sort(kept).astype(np.int64))


Opened = tuple[RecordSource, str]


def _open_mmeb_train(name: str, dataset: DatasetConfig, root: Path) -> Opened:
    split, subset = dataset.split or "original", dataset.subset or name
    source = mmeb_train(root / dataset.path, subset, split, _store(dataset, root), dataset.instruction)
    return source, source.fingerprint()


def _open_mmeb_eval(name: str, dataset: DatasetConfig, root: Path) -> Opened:
    subset = dataset.subset or name
    source = mmeb_eval(root / dataset.path, subset, _store(dataset, root), instruction=dataset.instruction)
    return source, source.fingerprint()


def _open_table(columns: Columns | None) -> Callable[[str, DatasetConfig, Path], Opened]:
    def open_(name: str, dataset: DatasetConfig, root: Path) -> Opened:
        chosen = columns or dataset.columns
        assert chosen is not None  # DatasetConfig saw to it
        paths = [Path(path) for path in sorted(glob.glob(str(root / dataset.path)))]
        if not dataset.path or not paths:
            raise SourceError(f"no file is called {str(root / dataset.path)!r}: correct `path`")
        folders = sorted({path.parent for path in paths})
        store = _store(dataset, root) or (open_store(folders) if len(folders) == 1 else None)
        source = TableSource(name, open_table(paths, chosen.names), chosen, store, dataset.instruction)
        if store is None and (first := next(source.paths(), None)) is not None:
            raise SourceError(
                f"its files lie in {len(folders)} folders, the first is {folders[0]}, and {first!r} may be in any: set "
                "`images` to a folder that all paths begin in, or make a data set of each folder"
            )
        return source, source.fingerprint()

    return open_


def _open_pictures(name: str, dataset: DatasetConfig, root: Path) -> Opened:
    split = dataset.split or "train"
    if split not in ("train", "validation"):
        raise SourceError(f"split {split!r} of the embedded pictures is not for training: choose train or validation")
    if dataset.kind not in KINDS:
        raise SourceError(f"kind {dataset.kind!r} does not exist: choose one of {', '.join(KINDS)}")
    if (stage := KINDS[dataset.kind].made_for) and set(dataset.stages) != {stage}:
        raise SourceError(f"kind {dataset.kind!r} is made for its stage alone: set stages to [{stage}]")
    if dataset.instruction:
        raise SourceError("the embedded pictures bring their instructions: leave `instruction` out")
    pictures = load_pictures(split)
    digest = hashlib.blake2b(dataset.kind.encode(), digest_size=16)  # the same pictures make other records
    for picture in pictures:
        digest.update(picture.id.encode() + picture.image.data)
    return picture_source(dataset.kind, pictures, mirror=True), digest.hexdigest()


def _store(dataset: DatasetConfig, root: Path) -> PictureStore | None:
    return open_store([root / place for place in dataset.images]) if dataset.images else None


def _open_tfds(name: str, dataset: DatasetConfig, root: Path) -> Opened:
    source = open_tfds(_folder(dataset, root), name, dataset.split or "train", dataset.instruction)
    return source, source.fingerprint()


def _open_prepared(name: str, dataset: DatasetConfig, root: Path) -> Opened:
    if dataset.instruction:
        raise SourceError("prepared data bring their instructions: give `instruction` when they are built")
    source = open_prepared(_folder(dataset, root), name)
    if source.made_for and set(dataset.stages) != {source.made_for}:
        raise SourceError(f"{dataset.path} is made for its stage alone: set stages to [{source.made_for}]")
    return source, source.fingerprint()


def _folder(dataset: DatasetConfig, root: Path) -> str:
    return dataset.path if dataset.path.startswith("gs://") else str(root / dataset.path)


_OPENERS: dict[str, Callable[[str, DatasetConfig, Path], Opened]] = {
    "mmeb-train": _open_mmeb_train,
    "mmeb-eval": _open_mmeb_eval,
    "cocoa-captions": _open_table(Columns(query_image="image_path", target_text="caption")),
    "cocoa-pairs": _open_table(Columns(query_text="qry", query_image="qry_image_path", target_text="pos_text")),
    "table": _open_table(None),
    "pictures": _open_pictures,
    "tfds": _open_tfds,
    "prepared": _open_prepared,
}
