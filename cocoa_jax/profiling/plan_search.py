"""Other settings of a planned step: remedies where it does not fit, and a search for the fastest that does."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cocoa_jax.config import SettingsError, TrainConfig
from cocoa_jax.profiling.cells import Cells, MeasurementError
from cocoa_jax.profiling.plan import plan_spec
from cocoa_jax.profiling.step_cost import own_rows
from cocoa_jax.profiling.topology import parse_topology
from cocoa_jax.training.mesh import mesh_sizes

Settings = Mapping[str, Any]
"""Values by their dotted names, such as ``compute.remat``."""
Say = Callable[[str], None]
POLICIES = ("products", "attention", "full", "none")  # of compute.remat, the likeliest to fit and be fast first


@dataclasses.dataclass(frozen=True)
class Tried:
    """What a step needs and takes with these settings changed."""

    settings: Settings
    result: Mapping[str, Any]

    @property
    def words(self) -> str:
        """The settings as they are given on the command line."""
        shown = {name: "null" if value is None else value for name, value in self.settings.items()}
        return " ".join(f"--{name}={value}" for name, value in shown.items()) or "as given"


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


def remedies(config: TrainConfig, topology: str, slices: int) -> list[Settings]:
    """Single knobs that need less memory and can be compiled, what costs least first."""
    compute, mesh, found = config.compute, config.mesh, list[Settings]()
    if compute.remat != "full":
        found.append({"compute.remat": "full"})
    if config.stage == "contrastive" and not compute.chunk_remat:
        found.append({"compute.chunk_remat": True})
    own = _own_rows(config, topology, slices)
    rows = min(own, compute.chunk_rows or own)
    found += [{"compute.chunk_rows": rows // part} for part in (2, 4) if rows % part == 0]
    if config.stage != "contrastive" and (compute.chunk_tokens is None or compute.chunk_tokens > 128):
        found.append({"compute.chunk_tokens": 128})
    if config.lora is not None and config.lora.base_dtype != "bfloat16":
        found.append({"lora.base_dtype": "bfloat16"})
    found += [{"mesh.data": -1, "mesh.fsdp": mesh.fsdp * more} for more in (2, 4) if mesh.fsdp > 0]
    return [choice for choice in found if _is_possible(changed(config, choice), topology, slices)]


def _is_possible(config: TrainConfig, topology: str, slices: int) -> bool:
    own = _own_rows(config, topology, slices)
    return own > 0 and own % min(own, config.compute.chunk_rows or own) == 0


def _own_rows(config: TrainConfig, topology: str, slices: int) -> int:
    """Rows of a device; 0 for a mesh that is none of these devices, or that cannot share the rows."""
    try:
        return own_rows(config, topology, slices)
    except ValueError:
        return 0


def candidates(config: TrainConfig, topology: str, slices: int) -> Iterator[Settings]:
    """Meshes, remat policies and chunks to try, the config's own first.

    Any few of the first hold several values of each: the next one is the likeliest to be fast among those whose
    values have been tried together least.
    """
    remats: list[Settings] = [{"compute.remat": one} for one in dict.fromkeys((config.compute.remat, *POLICIES))]
    left = [
        (mesh, remat, chunk)
        for mesh in _meshes(config, topology, slices)
        for remat in remats
        for chunk in _chunks(changed(config, mesh), topology, slices)
    ]
    tried = Counter[Any]()

    def pairs(choice: Sequence[Settings]) -> list[Any]:
        return list(itertools.combinations((tuple(part.items()) for part in choice), 2))

    while left:
        chosen = min(left, key=lambda choice: sum(tried[pair] for pair in pairs(choice)))
        left.remove(chosen)
        tried.update(pairs(chosen))
        yield {name: value for part in chosen for name, value in part.items()}


def _meshes(config: TrainConfig, topology: str, slices: int) -> list[Settings]:
    """Meshes of these devices that can share the rows, the config's own first."""
    devices = parse_topology(topology, slices)[1] // slices
    try:
        own = mesh_sizes(config.mesh, devices * slices, slices)[2:]
    except ValueError:  # a mesh of other devices
        own = (max(config.mesh.fsdp, 1), config.mesh.tensor)
    sizes = [
        own,
        *((fsdp, 1) for fsdp in (16, 8, devices, 4, 32, 1)),
        (16, 2),
        (8, 2),
        (devices // 2, 2),
    ]
    found: list[Settings] = [{"mesh.data": -1, "mesh.fsdp": F, "mesh.tensor": N} for F, N in dict.fromkeys(sizes)]
    return [choice for choice in found if _own_rows(changed(config, choice), topology, slices)]


def _chunks(config: TrainConfig, topology: str, slices: int) -> list[Settings]:
    """Chunks that make different programs, the config's own first."""
    compute, own = config.compute, own_rows(config, topology, slices)
    rows = [size for size in _distinct((compute.chunk_rows, 8, 4, 2, 1, None), own) if own % (size or 1) == 0]
    if config.stage == "contrastive":
        few = [size for size in rows if size][:1]  # all sizes keep the same
        kept: list[Settings] = [{"compute.chunk_rows": size, "compute.chunk_remat": False} for size in few]
        made: list[Settings] = [{"compute.chunk_rows": size, "compute.chunk_remat": True} for size in rows]
        return [made[0], *kept, *made[1:]] if compute.chunk_remat else kept + made
    M, sizes = config.data.rows.masked_per_row, (compute.chunk_tokens, 256, 64, 1024, None)
    return [
        {"compute.chunk_rows": size, "compute.chunk_tokens": tokens}
        for size in rows
        for tokens in _distinct(sizes, M * (size or own))
    ]


def _distinct(sizes: Iterable[int | None], most: int) -> list[int | None]:
    """Each once; what is no less than ``most`` is all of it, None."""
    return list(dict.fromkeys(size if size and size < most else None for size in sizes))


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
    tried = try_settings(config, topology, slices, remedies(config, topology, slices), cells, say)
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
