"""What a run is told to read, opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cocoa_jax.config import TrainConfig, load_mixture
from cocoa_jax.data.bad import KnownBad
from cocoa_jax.data.mixture import Mixture, open_mixture
from cocoa_jax.data.pairs import picture_source, some_things
from cocoa_jax.data.sources import load_pictures


def open_sources(config: TrainConfig) -> Mixture:
    """The embedded pictures' kinds of records, or the mixture that the settings name.

    Raises:
        SettingsError, SourceError, ValueError: naming what cannot be opened.
    """
    data = config.data
    if data.mixture:
        return open_mixture(load_mixture(data.mixture), config.stage)
    pictures = load_pictures(data.split)
    if data.labelled is not None:
        pictures = some_things(pictures, data.labelled)
    sources = {kind: picture_source(kind, pictures, data.mirror) for kind in data.kinds}
    identity: dict[str, Any] = {"stage": config.stage, "pictures": {"split": data.split, "kinds": dict(data.kinds)}}
    if data.labelled is not None:
        identity["labelled"] = data.labelled
    return Mixture(sources, data.kinds, identity)


def known_bad(config: TrainConfig, mixture: Mixture) -> KnownBad | None:
    """What a check of all records found, if the settings name it.

    Raises:
        ValueError: the file is about other data; TooManyBad: it names more than the settings allow.
    """
    bad = config.data.bad
    return None if bad.known is None else KnownBad.load(Path(bad.known), mixture.fingerprint, bad.ceiling)
