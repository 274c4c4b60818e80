"""What a run is told to read, opened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grain

from cocoa_jax.checkpoints.places import log_file
from cocoa_jax.config import TrainConfig, load_mixture
from cocoa_jax.data.bad import KnownBad
from cocoa_jax.data.mixture import Mixture, open_mixture
from cocoa_jax.data.packing import ALONE, RowShare
from cocoa_jax.data.pairs import picture_source, some_things
from cocoa_jax.data.pipeline import built_ahead, stage_dataset, widest_bytes
from cocoa_jax.data.planned import shrunk
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.rows import Arrays
from cocoa_jax.data.sources import PICTURES, load_pictures
from cocoa_jax.training.hosts import is_first

_log = logging.getLogger(__name__)


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
    shown = {"version": PICTURES.name, "split": data.split, "kinds": dict(data.kinds)}
    identity: dict[str, Any] = {"stage": config.stage, "pictures": shown}
    if data.labelled is not None:
        identity["labelled"] = data.labelled
    return Mixture(sources, data.kinds, identity)


def known_bad(config: TrainConfig, mixture: Mixture) -> KnownBad | None:
    """What a check of all records found, if the settings name it.

    Raises:
        ValueError: the file is about other data, or fewer negatives; TooManyBad: it names more than the settings allow.
    """
    bad, negatives = config.data.bad, config.data.negatives
    return None if bad.known is None else KnownBad.load(Path(bad.known), mixture.fingerprint, negatives, bad.ceiling)


def open_dataset(
    config: TrainConfig, processor: Processor, mixture: Mixture, share: RowShare = ALONE
) -> grain.MapDataset[Arrays]:
    """The batches that a run of these settings is fed on this host, by step.

    Raises:
        PackingError, ValueError: settings that contradict the data or each other.
    """
    # Hosts draw the same records, so that one of them names the bad ones for all.
    report = log_file(config.output, "bad_records.jsonl") if is_first() else None
    if is_first() and (names := shrunk(mixture.sources.values(), processor)):
        _log.warning(
            "the pictures of %s were made smaller by `cocoa data build` than this stage reads, and are enlarged: build "
            "at the largest resolution of all stages",
            ", ".join(names),
        )
    return stage_dataset(
        config.batches(),
        mixture.sources,
        mixture.weights,
        processor,
        seed=config.seed,
        steps=config.loop.steps,
        share=share,
        known=known_bad(config, mixture),
        report=report,
    )


def open_batches(config: TrainConfig, processor: Processor) -> grain.IterDataset[Arrays]:
    """The same from the first step on, for this process alone."""
    dataset = open_dataset(config, processor, open_sources(config))
    largest = widest_bytes(config.batches(), processor)
    return built_ahead(dataset, config.data.threads, config.data.workers, largest)
