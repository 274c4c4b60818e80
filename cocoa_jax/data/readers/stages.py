"""One source for all three stages: what a pair of stage 3 gives the stages that reconstruct."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from cocoa_jax.data.sources import Content, Record, RecordError

if TYPE_CHECKING:
    from cocoa_jax.data.pairs import RecordSource

Stage = Literal["warmup", "bridge", "contrastive"]


@dataclass(frozen=True)
class StagedSource:
    """The records of ``source`` as a stage wants them; whatever else is asked goes to ``source``."""

    source: RecordSource
    stage: Stage

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """The record at ``index``.

        Raises:
            RecordError: it cannot be read, or is of no use to the stage.
        """
        record = self.source.record(index, rng)
        try:
            return for_stage(record, self.stage)
        except RecordError as error:
            raise RecordError(f"{record.dataset} {record.id}: {error}") from error


def for_stage(record: Record, stage: Stage) -> Record:
    """A pair as an example to reconstruct, without its instructions where they would be rebuilt.

    Stage 1 sees every picture of the pair and then its words; stage 2 rebuilds the target's words, or, where the
    target is a picture and the query words (text-to-image retrieval), the words that belong to the picture.

    Raises:
        RecordError: stage 2 and both sides have pictures, or no words are left to rebuild.
    """
    if stage == "contrastive":
        return record
    record = replace(record, negatives=(), negative_keys=())
    query, target = record.query, record.target
    if stage == "warmup":
        words = " ".join(dict.fromkeys(part for part in (query.words, target.words) if part))
        return replace(record, query=Content(words, query.images + target.images), target=Content())
    if target.images and query.images:
        raise RecordError("query and target have pictures, stage 2 rebuilds words: leave the data set out of it")
    a, b = (target, query) if target.images else (query, target)
    if not b.words:
        raise RecordError("there are no words to rebuild, stage 2 needs some: leave the data set out of it")
    return replace(record, query=a, target=Content(b.words))
