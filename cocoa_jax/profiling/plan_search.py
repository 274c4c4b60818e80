"""Other settings of a planned step: remedies where it does not fit, and a search for the fastest that does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cocoa_jax.config import SettingsError, TrainConfig
from cocoa_jax.profiling.cells import Cells, MeasurementError
from cocoa_jax.profiling.plan import plan_spec
from cocoa_jax.profiling.topology import parse_topology

Settings = Mapping[str, Any]
"""Values by their dotted names, such as ``compute.remat``."""
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Tried:
    """What a step needs and takes with these settings changed."""

    settings: Settings
    result: Mapping[str, Any]

    @property
    def words(self) -> str:
        """The settings as they are given on the command line."""
        return " ".join(f"--{name}={value}" for name, value in self.settings.items()) or "as given"


def changed(config: TrainConfig, settings: Settings) -> TrainConfig:
    """``config`` with some values replaced."""
    for name, value in settings.items():
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    first, *rest = path
    values = {field.name: field for field in dataclasses.fields(config)}
    if first not in values:
        raise SettingsError(f"{type(config).__name__} has no setting {first!r}: choose one of {', '.join(values)}")
    inner = _replaced(vars(config)[first], rest, value) if rest else value
    return dataclasses.replace(config, **{first: inner})


def remedies(config: TrainConfig, devices: int) -> list[Settings]:
    """Single knobs that need less memory, what costs least first."""
    compute, mesh, found = config.compute, config.mesh, list[Settings]()
    if compute.remat != "full":
        found.append({"compute.remat": "full"})
    rows = compute.chunk_rows or config.data.rows.widest.rows // devices
    found += [{"compute.chunk_rows": rows // part} for part in (2, 4) if rows % part == 0 and rows >= part]
    if config.stage != "contrastive" and (compute.chunk_tokens is None or compute.chunk_tokens > 128):
        found.append({"compute.chunk_tokens": 128})
    if config.lora is not None and config.lora.base_dtype != "bfloat16":
        found.append({"lora.base_dtype": "bfloat16"})
    found += [{"mesh.data": -1, "mesh.fsdp": mesh.fsdp * more} for more in (2, 4) if 0 < mesh.fsdp * more <= devices]
    return found


def candidates(config: TrainConfig, devices: int) -> Iterator[Settings]:
    """Meshes, chunks and remat policies to try, the likeliest to be fast first: little recomputed, much whole."""
    rows = config.data.rows.widest.rows
    powers = [2**power for power in range(devices.bit_length()) if devices % 2**power == 0]
    shards = [fsdp for fsdp in powers if fsdp in (1, 4, 8, 16, 32) or fsdp == devices]
    chunks: list[Settings] = [{}]
    if config.stage == "contrastive":
        own = max(1, rows // devices)
        chunks = [{"compute.chunk_rows": size} for size in (8, 4, 2, 1) if own % size == 0]
    policies = ("attention", "full")
    for chunk, remat, fsdp, tensor in itertools.product(chunks, policies, shards, (1, 2)):
        if devices % (fsdp * tensor) == 0 and rows % (devices // tensor) == 0:
            mesh = {"mesh.data": -1, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
            yield {**mesh, "compute.remat": remat, **chunk}


def try_settings(
    config: TrainConfig, topology: str, slices: int, choices: list[Settings], cells: Cells, say: Say
) -> list[Tried]:
    """Each of the choices, compiled; one that fails for other reasons than memory is left out, and said."""
    tried = []
    for choice in choices:
        name = Tried(choice, {}).words
        try:
            result = cells.get(plan_spec(changed(config, choice), topology, slices))
        except (MeasurementError, ValueError) as error:
            say(f"{name}: {error}")
            continue
        done = Tried(choice, result)
        time = f", step at least {result['step_seconds'] * 1e3:.0f} ms" if result["fits"] else ""
        say(f"{name}: {'fits' if result['fits'] else 'does not fit'}, {result['needed'] / 2**30:.2f} GiB{time}")
        tried.append(done)
    return tried


def advise(config: TrainConfig, topology: str, slices: int, needed: float, cells: Cells, say: Say) -> str:
    """One line: which knobs would make a step fit that needs so many bytes, and what each saves."""
    devices = parse_topology(topology, slices)[1]
    tried = try_settings(config, topology, slices, remedies(config, devices // slices), cells, say)
    if not any(one.result["fits"] for one in tried) and tried:
        together = dict(item for one in tried for item in one.settings.items())
        tried += try_settings(config, topology, slices, [together], cells, say)
    saving = sorted((one for one in tried if one.result["needed"] < needed), key=lambda one: not one.result["fits"])
    if not saving:
        return "no setting saves memory: take a larger slice or smaller rows.shapes"
    parts = []
    for one in saving:
        verdict = "and fits" if one.result["fits"] else "and does not fit alone"
        parts.append(f"{one.words} saves {(needed - one.result['needed']) / 2**30:.2f} GiB {verdict}")
    more = "" if saving[0].result["fits"] else "; take a larger slice or smaller rows.shapes"
    return "; ".join(parts) + more


def ranked(tried: list[Tried]) -> list[Tried]:
    """What fits, by the least time of a step, then by memory."""
    fitting = [one for one in tried if one.result["fits"]]
    return sorted(fitting, key=lambda one: (one.result["step_seconds"], one.result["needed"]))
