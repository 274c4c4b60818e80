"""What a command line calls a source of records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from etils import epath

from cocoa_jax.data.mixture import DatasetConfig, MixtureConfig, made_for, open_dataset
from cocoa_jax.data.pairs import KINDS, RecordSource
from cocoa_jax.data.readers.stages import Stage
from cocoa_jax.data.readers.tfds import open_tfds
from cocoa_jax.data.sources import SourceError

NAMES = "a mixture file, pictures:KIND, pictures:KIND:validation, or the folder of a TFDS version, FOLDER:SPLIT"


@dataclasses.dataclass(frozen=True)
class OpenedSource:
    """An opened source.

    Args:
        contents: a fingerprint of what it holds.
        made_for: a stage for which its records are made already, "" for pairs.
    """

    name: str
    source: RecordSource
    contents: str
    made_for: Literal["", "warmup", "bridge"] = ""


def open_named(words: str, mixture: MixtureConfig | None) -> Iterator[OpenedSource]:
    """The sources that ``words`` name; several for a mixture, which is given where they name one.

    Raises:
        SourceError: there is none of this name, or it cannot be opened.
    """
    if mixture is not None:
        for name, dataset in mixture.datasets.items():
            yield _opened(name, dataset, Path(mixture.root))
    elif words.startswith("pictures:"):
        kind, _, split = words.removeprefix("pictures:").partition(":")
        # An unknown kind is refused where it is opened.
        stages: list[Stage] = [(KINDS[kind].made_for if kind in KINDS else "") or "contrastive"]
        yield _opened(kind, DatasetConfig("pictures", kind=kind, split=split, stages=stages), Path())
    else:
        folder, split = words, "train"
        if not (epath.Path(folder) / "dataset_info.json").exists() and ":" in words.removeprefix("gs://"):
            folder, _, split = words.rpartition(":")
        if not (epath.Path(folder) / "dataset_info.json").exists():
            raise SourceError(f"{words} is no source: name {NAMES}")
        path = epath.Path(folder)
        versioned = path.name[:1].isdigit()
        tfds = open_tfds(folder, (path.parent if versioned else path).name, split)
        yield OpenedSource(tfds.name, tfds, tfds.fingerprint())


def _opened(name: str, dataset: DatasetConfig, root: Path) -> OpenedSource:
    source, contents = open_dataset(name, dataset, root)
    return OpenedSource(name, source, contents, made_for(dataset, source))
