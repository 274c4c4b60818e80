"""Bytes over the interconnect, by collective and mesh axis, from the text of a compiled module."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cocoa_jax.profiling.hlo import COLLECTIVES, ENDED, Module, Op, hbm

SLOW_AXIS = "slice"  # what is sent along it leaves the slice, over the data-centre network
_GOES_ON = "async_collective_fusion"  # computations of other work beside which a collective goes on
Groups = frozenset[frozenset[int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Args:
        name: of the operation.
        kind: ``all-gather`` and so on; ``all-reduce-scatter`` for an all-reduce of which each device keeps a part.
        axis: mesh axes that its groups run along, joined by ``+``; ``other`` where they follow none.
        group: devices of one group.
        payload: bytes of its result on one device (of its input for a reduce-scatter).
        runs: how often it runs in one call of the program.
        wire: bytes that one device sends over the interconnect in one call, all runs together.
        scope: where the source made it.
    """

    name: str
    kind: str
    axis: str
    group: int
    payload: float
    runs: float
    wire: float
    scope: str


def ring_bytes(kind: str, payload: float, group: int) -> float:
    """Bytes that one device sends in a ring of ``group`` devices.

    Args:
        payload: of an all-gather the gathered array, of a reduce-scatter the scattered part, else the array.
    """
    share = (group - 1) / group
    factors = {
        "all-gather": share,
        "reduce-scatter": float(group - 1),
        "all-reduce": 2 * share,
        "all-reduce-scatter": share,
        "all-to-all": share,
        "ragged-all-to-all": share,
    }
    return payload * factors.get(kind, 1.0)  # a permutation sends what it has once


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective of a module that runs.

    The program of one of several slices numbers its own devices, and speaks with the other slices through their hosts:
    that is of the axis ``slice``.

    Args:
        mesh: devices along each axis, in the order of the mesh.
    """
    slices = mesh.get(SLOW_AXIS, 1)
    if module.devices * slices == math.prod(mesh.values()):
        mesh = {**mesh, SLOW_AXIS: 1}
    scattered, carried = _scattered(module), _carried_on(module)
    within = [
        _collective(op, kind, times, mesh, kept_in_parts=where in scattered)
        for where, times in _running(module).items()
        if times and where not in carried
        for op in module.computations[where]
        if (kind := op.kind.removesuffix("-start")) in COLLECTIVES
    ]
    return within + list(_between_slices(module, slices))


def _collective(op: Op, kind: str, times: float, mesh: Mapping[str, int], *, kept_in_parts: bool) -> Collective:
    groups = _groups(op, math.prod(mesh.values()))
    group = max((len(members) for members in groups), default=1)
    payload = _payload(op, kind, group)
    label = "all-reduce-scatter" if kind == "all-reduce" and kept_in_parts else kind
    wire = ring_bytes(label, payload, group) * times if group > 1 else 0.0
    axis = axes_of(groups, mesh) if kind != "collective-permute" else _permuted_axis(groups, mesh)
    return Collective(op.name, label, axis, group, payload, times, wire, op.scope)


def _between_slices(module: Module, slices: int) -> Iterator[Collective]:
    """What devices hand to their hosts for other slices; it is counted as a ring of slices, as within one."""
    for where, times in _running(module).items():
        for op in module.computations[where]:
            handed = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest)
            if op.kind != "send" or handed is None:
                continue
            kind = handed[1].lower().replace("_", "-")
            own = float(hbm(module.shapes[where, op.operands[0]], any_space=True))
            payload = own * {"all-gather": slices, "reduce-scatter": 1 / slices}.get(kind, 1.0)
            wire = ring_bytes(kind, payload, slices) * times
            yield Collective(op.name, kind, SLOW_AXIS, slices, payload, times, wire, op.scope)


def by_axis(found: Sequence[Collective]) -> list[tuple[str, str, int, int, float]]:
    """Sums as (collective, axis, sites, runs, bytes that one device sends), the largest first."""
    sums: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for one in found:
        total = sums[one.kind, one.axis]
        total[0], total[1], total[2] = total[0] + 1, total[1] + one.runs, total[2] + one.wire
    rows = [(kind, axis, int(v[0]), int(v[1]), v[2]) for (kind, axis), v in sums.items()]
    return sorted(rows, key=lambda row: -row[4])


def seconds_sent(
    sent: Sequence[tuple[str, str, int, int, float]], ici_bandwidth: float, dcn_bandwidth: float
) -> tuple[float, float]:
    """Seconds of what one device sends inside of its slice and to others, given ``by_axis`` and bytes a second."""
    slow = sum(row[4] for row in sent if SLOW_AXIS in row[1].split("+"))
    return (sum(row[4] for row in sent) - slow) / ici_bandwidth, slow / dcn_bandwidth


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> str:
    """The mesh axes, joined by ``+``, along which these groups of device places run."""
    axes = [name for name, size in mesh.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            if groups == _mesh_groups(mesh, chosen):
                return "+".join(chosen)
    return "other"


def _permuted_axis(groups: Groups, mesh: Mapping[str, int]) -> str:
    """The fewest axes in whose groups every pair of a permutation lies."""
    axes = [name for name, size in mesh.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            if all(any(pair <= whole for whole in _mesh_groups(mesh, chosen)) for pair in groups):
                return "+".join(chosen)
    return "other"


def _mesh_groups(mesh: Mapping[str, int], chosen: Sequence[str]) -> Groups:
    names = list(mesh)
    places = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    kept = [names.index(name) for name in names if name not in chosen]
    moved = [names.index(name) for name in chosen]
    rows = places.transpose(kept + moved).reshape(-1, math.prod(mesh[name] for name in chosen))
    return frozenset(frozenset(map(int, row)) for row in rows)


def _groups(op: Op, devices: int) -> Groups:
    """The groups of an operation in any of XLA's four spellings."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", op.rest)
    if pairs:
        members = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return frozenset(frozenset((int(a), int(b))) for a, b in members if a != b)
    plain = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", op.rest)
    if plain:
        return frozenset(frozenset(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", plain[1]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", op.rest)
    if iota:
        rows = _iota(iota[2]).reshape(_numbers(iota[1]))
        return frozenset(frozenset(map(int, row)) for row in rows.reshape(-1, rows.shape[-1]))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\))\)| *, device_ids=\((\[[\d,]+\])\))? *\{([^}]*)\}",
        op.rest,
    )
    if named:
        sides = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _iota(named[2] or named[3]) if named[2] or named[3] else np.arange(math.prod(sides.values()))
        return frozenset(
            frozenset(int(ids[place]) for place in group)
            for group in _mesh_groups(sides, re.findall(r"'([^']+)'", named[4]))
        )
    return frozenset({frozenset(range(devices))})  # none given: everybody


def _iota(text: str) -> np.ndarray:
    sides = _numbers(text[1 : text.index("]")])
    ids = np.arange(math.prod(sides)).reshape(sides)
    order = re.search(r"T\(([\d,]+)\)", text)
    return (ids.transpose(_numbers(order[1])) if order else ids).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _payload(op: Op, kind: str, group: int) -> float:
    """Bytes of the result; a ``-start`` shows input and result side by side."""
    size = float(hbm(op.shape, any_space=True))
    if not op.kind.endswith("-start") or not op.shape.startswith("("):
        return size
    return size * group / (group + 1) if kind == "all-gather" else size / 2


def _scattered(module: Module) -> set[str]:
    """Computations in which an all-reduce is kept in parts: the compiler names them so."""
    found = {name for name in module.computations if "all-reduce-scatter" in name}
    for ops in module.computations.values():
        found |= {called for op in ops if "all-reduce-scatter" in op.name for called in op.called}
    return found


def _carried_on(module: Module) -> set[str]:
    """Computations in which a collective goes on or ends that another has begun: each of them prints it again.

    Copies of one that runs in several places share its channel, so that the channel does not tell.
    """
    ended = (op for ops in module.computations.values() for op in ops if op.name.startswith(ENDED))
    return {called for op in ended for called in op.called} | {
        name for name in module.computations if name.startswith(_GOES_ON)
    }


def _running(module: Module) -> dict[str, float]:
    """How often each computation runs, fusions included: collectives may be fused."""
    times = dict(module.runs)
    waiting = list(times)
    while waiting:
        where = waiting.pop()
        for op in module.computations.get(where, []):
            if op.kind in ("fusion", "custom-call"):
                for called in op.called:
                    if called in module.computations and called not in times:
                        times[called] = times[where]
                        waiting.append(called)
    return times
