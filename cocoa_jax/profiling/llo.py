"""Issue cycles of a compiled op, from the VLIW bundles that libtpu dumps.

One bundle issues a cycle, so bundles times how often each runs is a lower bound of the time of an op: it knows of no
wait for memory, no interlock and no interconnect. A Pallas kernel is a loop over its grid whose body holds predicated
regions (``pl.when``): how often each runs depends on the data, so the caller says it (``GridCounts``), and nothing is
assumed. libtpu's own estimate is not used: it does not run on Pallas kernels.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
"""What ``LIBTPU_INIT_ARGS`` has to say before libtpu is loaded, once a process."""

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +((?:[A-Z]{2} ?)*):((?: ?>)*) *\{", re.MULTILINE)
_MARK = re.compile(r"(Start|End) region (\d+)")
_EMPTY = re.compile(r"Start/End empty region (\d+)")
_JUMP = re.compile(r"target = \$region(\d+)")
_DELAY = 8  # bundles
_EXIT = re.compile(r"scmp\.\w+\.s32[\w.]* [^,;]*, ([^ ,;]+) /\* loop exit test")
_MATMUL = re.compile(r"\bvmat(?:mul|push)")
_VECTOR = re.compile(r"= (v(?!sync)[a-z]+)")
VREG = 4096  # bytes of a vector register
_FILE = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")
SMALL = 8  # bundles; a predicated region below this is a flag or a transfer, and counts with the step


class LloError(ValueError):
    """A dump that cannot be read, or a figure that needs counts which were not given."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One VLIW instruction: its control tags, how many loops it is in, and its text."""

    tags: tuple[str, ...]
    depth: int
    text: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles ``first`` to ``last`` (inclusive) at this depth; ``trips`` is None where the data decide."""

    first: int
    last: int
    depth: int
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles ``first`` to ``last`` (inclusive); ``predicated`` where a branch may jump over them."""

    first: int
    last: int
    predicated: bool

    @property
    def size(self) -> int:
        """Bundles in it."""
        return self.last - self.first + 1

    def holds(self, other: Region) -> bool:
        """Whether ``other`` is a smaller region inside this one."""
        return self != other and self.first <= other.first and other.last <= self.last


@dataclasses.dataclass(frozen=True)
class GridCounts:
    """How often the parts of a kernel's grid loop run on the given data, in one call.

    Args:
        steps: grid steps in all.
        begin: runs of each predicated region before the compute regions, in their order; one entry serves them all,
            and so does the largest where the compiler has left fewer regions.
        compute: runs of each compute region, those with the fewest comparisons (the unmasked ones) first; a kernel
            with one compute region runs it for all of them.
        finish: as ``begin``, behind the compute regions.
        copies: runs by size in bytes of regions that only copy a block, which the compiler makes of operands that lie
            in vector memory already; a size that is not named is copied every step.
        cores: TensorCores that share the steps of one call; worked out where the compiler knows the steps.
    """

    steps: float
    begin: tuple[float, ...]
    compute: tuple[float, ...]
    finish: tuple[float, ...]
    copies: Mapping[int, float] = dataclasses.field(default_factory=dict)
    cores: int = 1


@dataclasses.dataclass(frozen=True)
class Compute:
    """A compute region: its cycles, its bundles, and how many vector comparisons it makes."""

    cycles: float
    bundles: int
    compares: int


@dataclasses.dataclass(frozen=True)
class Parts:
    """A kernel's cycles, cut by how often they run; the tuples are ordered as in ``GridCounts``.

    Args:
        once: outside of the grid loop.
        step: every grid step.
        begin, compute, finish: the predicated regions.
        copies: cycles and size in bytes of the regions that only copy a block.
        trips: of the grid loop where the compiler knows them, its two stages of prefetching included.
    """

    once: float
    step: float
    begin: tuple[float, ...]
    compute: tuple[Compute, ...]
    finish: tuple[float, ...]
    copies: tuple[tuple[float, int], ...]
    trips: int | None


class Program:
    """The bundles of one op, with its loops and regions."""

    def __init__(self, text: str):
        heads = list(_BUNDLE.finditer(text))
        if not heads:
            raise LloError("no bundles in the dump: is it a *-final_bundles.txt of libtpu 0.0.42.*?")
        ends = [head.start() for head in heads[1:]] + [len(text)]
        self.bundles: list[Bundle] = []
        for head, end in zip(heads, ends, strict=True):
            body, depth = text[head.end() : end], head[2].count(">")
            if body.lstrip().startswith("}") and self.bundles:  # an empty bundle is printed without its depth
                depth = self.bundles[-1].depth
            self.bundles.append(Bundle(tuple(head[1].split()), depth, body))
        self.loops = _loops(self.bundles)
        self.regions = _regions(self.bundles)

    def issue_cycles(self) -> float:
        """Every region taken, every loop run as often as the compiler knows.

        Raises:
            LloError: a loop whose length only the data know.
        """
        if self.dynamic:
            raise LloError(f"{self.dynamic} loops have no fixed length: give GridCounts")
        return sum(self.weights())

    @property
    def dynamic(self) -> int:
        """Loops of unknown length."""
        return sum(loop.trips is None for loop in self.loops)

    def weights(self, inside: Loop | None = None) -> list[float]:
        """How often each bundle runs, in all or in one turn of ``inside``; a loop of unknown length runs once."""
        weights = [1.0] * len(self.bundles)
        for loop in self.loops:
            if inside is None or loop.depth > inside.depth:
                for place in range(loop.first, loop.last + 1):
                    weights[place] *= max(loop.trips or 1, 1)
        return weights

    @functools.cached_property
    def parts(self) -> Parts:
        """The kernel cut by how often its bundles run."""
        grid = self._grid()
        if grid is None:
            return Parts(sum(self.weights()), 0.0, (), (), (), (), None)
        weights = self.weights(grid)
        inner = [
            region
            for region in self.regions
            if region.predicated and grid.first < region.first and region.last <= grid.last and region.size >= SMALL
        ]
        work = _outermost([region for region in inner if self._works(region, inner)])
        # What holds compute regions runs every step; what stands beside them runs where a block begins or ends.
        beside = [r for r in inner if not any(r == w or r.holds(w) or w.holds(r) for w in work)]
        beside = _outermost(beside) if work else []

        def cycles(region: Region | Loop) -> float:
            return sum(weights[region.first : region.last + 1])

        # A region that stores no vector starts a transfer or sets a flag: it counts with the step.
        ends = [region for region in beside if self._vectors(region)["vst"] and not self._copied(region)]
        begin = tuple(cycles(region) for region in ends if region.last < work[0].first)
        finish = tuple(cycles(region) for region in ends if region.first > work[-1].last)
        copies = tuple((cycles(region), size) for region in beside if (size := self._copied(region)))
        compute = [Compute(cycles(r), r.size, self._compares(r)) for r in work]
        apart = sum(begin) + sum(finish) + sum(part.cycles for part in compute) + sum(part[0] for part in copies)
        once = sum(self.weights()[: grid.first]) + sum(self.weights()[grid.last + 1 :])
        ordered = tuple(sorted(compute, key=lambda part: part.compares))
        return Parts(once, cycles(grid) - apart, begin, ordered, finish, copies, grid.trips)

    def kernel_cycles(self, counts: GridCounts) -> float:
        """Issue cycles of one call on data for which the parts run as often as ``counts`` says.

        Raises:
            LloError: another number of regions than of counts, or of steps than the compiler knows.
        """
        parts, cores = self.parts, float(counts.cores)
        if parts.trips is not None:
            cores = counts.steps / max(parts.trips - 2, 1)
            if cores not in (1, 2):
                raise LloError(
                    f"the grid loop runs {parts.trips} times, 2 of them to prefetch, the counts say {counts.steps:g} "
                    "steps: correct GridCounts.steps"
                )
        runs = (sum(counts.compute),) if len(parts.compute) == 1 else counts.compute
        work = _times("compute", tuple(part.cycles for part in parts.compute), runs)
        ends = _times("begin", parts.begin, counts.begin) + _times("finish", parts.finish, counts.finish)
        copied = sum(cycles * counts.copies.get(size, counts.steps) for cycles, size in parts.copies)
        return parts.once + (counts.steps / cores + 2) * parts.step + (work + ends + copied) / cores

    def _grid(self) -> Loop | None:
        """The outermost loop that holds matrix products, else the longest outermost one; the grid of a kernel."""
        outer = [loop for loop in self.loops if loop.depth == 1]

        def size(loop: Loop) -> tuple[bool, int]:
            held = self.bundles[loop.first : loop.last + 1]
            return any(_MATMUL.search(bundle.text) for bundle in held), loop.last - loop.first

        return max(outer, key=size, default=None)

    def _works(self, region: Region, inner: list[Region]) -> bool:
        """Whether matrix products stand in the region itself and not only in predicated regions inside it."""
        nested = [other for other in inner if region.holds(other)]
        return any(
            _MATMUL.search(self.bundles[place].text) and not any(other.first <= place <= other.last for other in nested)
            for place in range(region.first, region.last + 1)
        )

    def _copied(self, region: Region) -> int:
        """Bytes that a region copies if it does nothing else, else 0."""
        kinds = self._vectors(region)
        return kinds["vst"] * VREG if set(kinds) == {"vld", "vst"} and kinds["vld"] == kinds["vst"] else 0

    def _vectors(self, region: Region) -> collections.Counter[str]:
        """How many vector instructions of each kind it has."""
        text = "".join(bundle.text for bundle in self.bundles[region.first : region.last + 1])
        return collections.Counter(_VECTOR.findall(text))

    def _compares(self, region: Region) -> int:
        return sum(bundle.text.count("vcmp") for bundle in self.bundles[region.first : region.last + 1])


def read_program(path: Path) -> Program:
    """The bundles in one dumped file.

    Raises:
        LloError: naming the file.
    """
    try:
        return Program(path.read_text())
    except LloError as error:
        raise LloError(f"{path}: {error}") from error


def dumped(folder: Path) -> dict[str, Path]:
    """The dump of every op of a compiled module by the op's name in its HLO."""
    found = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = _FILE.match(path.name)
        if match and "schedule-analysis" not in path.name:
            found[match[1]] = path
    return found


def _loops(bundles: list[Bundle]) -> list[Loop]:
    """A loop begins at a tag LB and ends where the depth falls, or another loop of its depth begins."""
    loops = []
    for first, bundle in enumerate(bundles):
        if "LB" not in bundle.tags:
            continue
        last = first
        while last + 1 < len(bundles):
            after = bundles[last + 1]
            if after.depth < bundle.depth or (after.depth == bundle.depth and "LB" in after.tags):
                break
            last += 1
        loops.append(Loop(first, last, bundle.depth, _trips(bundles, first, last, bundle.depth)))
    return loops


def _trips(bundles: list[Bundle], first: int, last: int, depth: int) -> int | None:
    """The bound of the loop's own exit test, which compares a counter from 0 by 1 with a number or a register."""
    for bundle in reversed(bundles[first : last + 1]):
        match = _EXIT.search(bundle.text) if bundle.depth == depth else None
        if match:
            return int(match[1]) if match[1].isdigit() else None
    return None


def _regions(bundles: list[Bundle]) -> list[Region]:
    jumps: dict[str, list[int]] = {}
    for place, bundle in enumerate(bundles):
        for target in _JUMP.findall(bundle.text):
            jumps.setdefault(target, []).append(place)
    starts: dict[str, int] = {}
    regions = []
    for place, bundle in enumerate(bundles):
        for kind, name in _MARK.findall(bundle.text):
            if kind == "Start":
                starts[name] = place
            elif name in starts:
                first = starts.pop(name)
                # What can be jumped over is followed by an empty region that the branch at its head aims at; a branch
                # takes a few bundles to act, so it may stand a little before.
                landing = _EMPTY.findall(bundles[place + 1].text) if place + 1 < len(bundles) else []
                aimed = [at for target in landing for at in jumps.get(target, ())]
                regions.append(Region(first, place, any(first - _DELAY <= at <= place for at in aimed)))
    return regions


def _outermost(regions: list[Region]) -> list[Region]:
    return [region for region in regions if not any(other.holds(region) for other in regions)]


def _times(name: str, cycles: tuple[float, ...], runs: tuple[float, ...]) -> float:
    """Cycles times runs; a single count serves every region of ``begin`` and ``finish``.

    The compiler turns a short region into predicated instructions, which count with the step: of those that are left
    it is not known which they are, so each is charged the largest count.
    """
    if name != "compute" and (len(runs) == 1 or len(cycles) < len(runs)):
        runs = (max(runs, default=0.0),) * len(cycles)
    if len(runs) != len(cycles):
        raise LloError(f"the kernel has {len(cycles)} regions of kind {name!r}, counts are given for {len(runs)}")
    return sum(part * run for part, run in zip(cycles, runs, strict=True))
