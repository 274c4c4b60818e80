"""Whether all hosts of a run hold the same: settings and data before the first step, then what every batch is made of.

Each host reads the files that lie on it and plans the batches by itself. Where files differ, so would the programs, or
rows of one batch would be paired with those of another.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoa_jax.config import SettingsError, TrainConfig, differences, to_dict
from cocoa_jax.data.mixture import Mixture
from cocoa_jax.data.processor import Processor
from cocoa_jax.training.folder import has_begun, without
from cocoa_jax.training.hosts import meet
from cocoa_jax.training.mesh import replicated
from cocoa_jax.training.place import GLOBAL

# What may differ from host to host: where things lie, and what changes no batch and no program.
_LOCAL = (
    "output",
    "checkpoint",
    "distributed",
    "data.mixture",
    "data.threads",
    "data.workers",
    "data.decoded_mib",
    "loop.profile",
    "loop.compilation_cache",
    "loop.wandb",
)


class Disagreed(SettingsError):
    """Hosts of a run hold or read something else than the others; all of them raise it."""


def held_here(config: TrainConfig, mixture: Mixture, processor: Processor) -> dict[str, Any]:
    """What this host holds of what all must hold alike (JSON)."""
    settings = without(to_dict(config), _LOCAL)
    known = config.data.bad.known
    settings["data"]["bad"]["known"] = known and f"{zlib.crc32(Path(known).read_bytes()):08x}"
    counts = {name: len(source) for name, source in mixture.sources.items()}
    held = {
        "settings": settings,
        "data": dict(mixture.identity),
        "records": counts,
        "model": to_dict(processor.config),
        "tokenizer and pixels": processor.fingerprint(),
        # Who enters the collectives of ``with_mean_rows``. Where the first checkpoint is gone since, a host reads the
        # tokenizer of the run itself, which lacks none.
        "added tokens": {} if has_begun(config.output) else dict(processor.added),
    }
    return dict(json.loads(json.dumps(held)))


def check_alike(held: Mapping[str, Any]) -> None:
    """See that all processes hold the same; alone, this does nothing.

    Raises:
        Disagreed: on all of them, naming those that hold something else, and what.
    """
    if jax.process_count() == 1:
        return
    meet()  # the first collective of a run; some hosts open their tables long before others
    all_ = _gathered(json.dumps(held, sort_keys=True))
    odd = odd_ones(all_)
    if odd:
        usual = next(text for process, text in enumerate(all_) if process not in odd)
        what = differences(json.loads(usual), json.loads(all_[odd[0]]))
        more = f" and {len(what) - 5} more" if len(what) > 5 else ""
        raise Disagreed(
            f"processes {odd} do not hold what the others do ({'; '.join(what[:5])}{more}): give all hosts the same "
            "files and the same command"
        )


def _gathered(text: str) -> list[str]:
    """The text of every process."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def odd_ones(held: Sequence[Any]) -> list[int]:
    """Processes that do not hold what most of them do, or what the first does where there is no such majority."""
    counts = Counter(held)
    usual = max(counts, key=lambda one: (counts[one], one == held[0]))
    return [process for process, one in enumerate(held) if one != usual]


def planned(batch: Mapping[str, np.ndarray], stats: np.ndarray, mesh: Mesh, state: Any) -> jax.Array | None:
    """What every host has planned of a batch, as a number for each device of the mesh; None where one is alone.

    It is on its way when this returns, before the step: that would wait for ever where shapes differ.

    Args:
        batch: this host's share, with what is global, as it was planned.
        state: of the step before.
    """
    if jax.process_count() == 1:
        return None
    number = np.full(1, _checksum(batch, stats), np.uint32)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shared = mesh.devices.flat[0].platform == "cpu"
    if shared:  # devices of a CPU share its threads, which two programs that wait for others can hold all of
        jax.block_until_ready(state)
    found = _everywhere(mesh)(jax.make_array_from_callback((mesh.size,), sharding, lambda index: number))
    return jax.block_until_ready(found) if shared else found


def check_planned(step: int, numbers: jax.Array | None, mesh: Mesh) -> None:
    """See that all hosts planned a step alike, by what ``planned`` gave.

    Raises:
        Disagreed: on all of them, naming those that did not.
    """
    if numbers is None:
        return
    owners = [device.process_index for device in mesh.devices.flat]
    found = dict(zip(owners, np.asarray(numbers).tolist(), strict=True))
    odd = odd_ones([found[process] for process in sorted(found)])
    if odd:
        raise Disagreed(
            f"processes {odd} read other records than the others for step {step}: files of the data are missing, "
            "damaged or others there; copy the data again, and the same command continues from the last checkpoint"
        )


def _checksum(batch: Mapping[str, np.ndarray], stats: np.ndarray) -> int:
    """Of what is global, of the numbers of records, tokens and replacements, and of the shapes of the rest."""
    total = zlib.crc32(
        repr([(name, batch[name].shape) for name in sorted(batch)]).encode(), zlib.crc32(stats.tobytes())
    )
    for name in GLOBAL:
        if name in batch:
            total = zlib.crc32(np.ascontiguousarray(batch[name]).tobytes(), total)
    return total


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda numbers: numbers, out_shardings=replicated(mesh))
