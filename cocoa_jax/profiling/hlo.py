"""Optimised HLO text as operations with what each one costs: how often it runs, its FLOPs and its bytes in HBM.

XLA's own cost analysis counts the body of a loop once and a Pallas kernel not at all; this reads the text instead.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Set

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "c64": 8}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation)=\{?([^,}]*(?:, ?%[^,}]*)*)"
)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_ALIASED = re.compile(r"\{(\d*)\}: \(\d+, \{\d*\}\)")
_BEGUN, ENDED = "async-collective-start", "async-collective-done"  # fusions of a collective that goes on in others
_ALLOCATES = 'custom_call_target="AllocateBuffer"'  # and writes nothing
_FREE = re.compile(  # neither runs nor moves data, or is counted where it starts
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|partition-id|replica-id"
    r"|opt-barrier|.*-done"
)


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction: ``shape`` and ``rest`` (its attributes) are text, ``operands`` names."""

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    root: bool
    raw_operands: str

    @property
    def scope(self) -> str:
        """Where the program's source made it, such as ``jit(step)/stage2/text/attention/dot_general``."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def starts(self) -> bool:
        """Whether it only begins what goes on beside the operations after it."""
        return self.kind.endswith("-start") or self.kind in ("send", "recv") or self.name.startswith(_BEGUN)

    @property
    def called(self) -> list[str]:
        """Computations that it runs, loops apart."""
        return [name for match in _CALLED.finditer(self.rest) for name in _NAME.findall(match[1])]


class Module:
    """A compiled module: its computations by name, and how often each one runs in one call of the program.

    ``devices`` are those that run it together, of several slices those of one; 0 where the text does not say.
    """

    def __init__(self, text: str):
        count = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
        self.devices = int(count[1]) if count else 0
        self.computations: dict[str, list[Op]] = {}
        self.entry = ""
        current: list[Op] | None = None
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (op := _parse(line)):
                current.append(op)
        if not self.entry:
            raise ValueError("the HLO text has no ENTRY computation: give the text of a compiled module")
        self.runs: dict[str, float] = collections.defaultdict(float)
        self._visit(self.entry, 1.0)

    @functools.cached_property
    def shapes(self) -> dict[tuple[str, str], str]:
        """The shape of every operation, by (computation, name)."""
        return {(where, op.name): op.shape for where, ops in self.computations.items() for op in ops}

    def flops(self, where: str, op: Op) -> float:
        """FLOPs of the matrix products in one run of ``op``, those of a fusion included."""
        if op.kind in ("convolution", "dot"):
            shapes = [self.shapes[where, name] for name in op.operands[:2]]
            return (_convolution if op.kind == "convolution" else _dot)(op, *shapes)
        if op.kind in ("fusion", "async-start") and op.called:
            return sum(self.flops(inner, part) for inner in op.called for part in self.computations.get(inner, []))
        return 0.0

    def hbm_bytes(self, where: str, op: Op) -> float:
        """Bytes that one run of ``op`` reads and writes in HBM; what lies in VMEM (memory space 1) costs none.

        A slice reads its own size only, an update of a part writes that part only, in a fusion too. A collective that
        goes on in several fusions writes its result once, where it starts.
        """
        if _FREE.fullmatch(op.kind) or op.name.startswith(ENDED) or _ALLOCATES in op.rest:
            return 0.0
        if op.kind in ("copy-start", "slice-start"):
            # ((source), destination, flag): both ends carry the data that move, a slice that of its destination.
            moved = _arrays(op.shape)[1] if len(_arrays(op.shape)) > 1 else _arrays(op.shape)[0]
            return 2.0 * moved.bytes if moved.space == 0 and _arrays(op.shape)[0].space == 0 else float(moved.bytes)
        if op.kind in ("dynamic-slice", "slice", "gather"):
            return 2.0 * hbm(op.shape)
        if op.kind in ("dynamic-update-slice", "scatter"):
            update = op.operands[1] if op.kind == "dynamic-update-slice" else op.operands[-1]
            return 2.0 * hbm(self.shapes.get((where, update), ""))
        if op.starts and op.kind != "fusion":
            # A shape that is a tuple holds both ends.
            return float(hbm(op.shape) * (1 if op.shape.startswith("(") else 2))
        inputs: list[float] = [hbm(self.shapes.get((where, name), "")) for name in op.operands]
        if op.kind == "fusion" and op.called:
            body = self.computations.get(op.called[0], [])
            carried = _carried(op, body)
            inputs = [min(whole, self._read(body, place, carried)) for place, whole in enumerate(inputs)]
            return self._written(op, body) + sum(inputs)
        return float(hbm(op.shape) + sum(inputs))

    def _written(self, op: Op, body: list[Op]) -> float:
        """Bytes in HBM that a fusion writes: of an array that it updates in place the updated part."""
        arrays, ops = _arrays(op.shape), {part.name: part for part in body}
        root = next(part for part in body if part.root)
        one_each = root.kind == "tuple" and len(root.operands) == len(arrays)
        names = root.operands if one_each else [root.name] * len(arrays)
        kept = _handed_on(op)
        total = 0.0
        for place, (array, name) in enumerate(zip(arrays, names, strict=True)):
            if array.space != 0 or place in kept:
                continue
            maker = ops[name]
            while maker.kind in ("bitcast", "convert") and maker.operands[0] in ops:
                maker = ops[maker.operands[0]]
            update = maker.kind == "dynamic-update-slice"
            part = hbm(self.shapes.get((op.called[0], maker.operands[1]), ""), any_space=True) if update else math.inf
            total += min(array.bytes, part)
        return total

    def _read(self, body: list[Op], place: int, carried: Set[str] = frozenset()) -> float:
        """Bytes that a fusion, or one inside of it, reads of its parameter number ``place``; infinite where all."""
        name = next((op.name for op in body if op.kind == "parameter" and op.raw_operands == str(place)), None)
        total = 0.0
        for user in (op for op in body if name in op.operands and op.name not in carried):
            if user.kind == "dynamic-slice" and user.operands[0] == name:
                total += hbm(user.shape, any_space=True)
            elif user.kind == "fusion" and user.called:
                inner = self.computations.get(user.called[0], [])
                total += sum(self._read(inner, i) for i, operand in enumerate(user.operands) if operand == name)
            elif user.kind != "dynamic-update-slice" or user.operands[0] != name:
                return math.inf
        return total

    def _visit(self, name: str, times: float) -> None:
        self.runs[name] += times
        for op in self.computations.get(name, []):
            if op.kind == "while":
                loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", op.rest)
                if loop:
                    self._visit(loop[2], times * self._trips(op, loop[1], loop[2]))
            elif op.kind in ("call", "conditional", "async-start"):
                for called in op.called:
                    self._visit(called, times)

    def _trips(self, op: Op, condition: str, body: str) -> float:
        """How often a loop runs: as the compiler says, else the bound of its counter divided by its step."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest)
        if known:
            return float(known[1])
        tests = {part.name: part for part in self.computations.get(condition, [])}
        test = next((part for part in tests.values() if part.root), None)
        if test is None or test.kind != "compare" or "direction=LT" not in test.rest:
            return 1.0
        counter, limit = (tests.get(name) for name in test.operands)
        bound = _constant(limit)
        if bound is None or counter is None:
            return 1.0
        return max(bound // self._step(counter, body), 1)

    def _step(self, counter: Op, body: str) -> int:
        """What a turn of the loop adds to the counter."""
        index = re.search(r"index=(\d+)", counter.rest)
        parts = {part.name: part for part in self.computations.get(body, [])}
        root = next((part for part in parts.values() if part.root), None)
        if index is None or root is None or int(index[1]) >= len(root.operands):
            return 1
        add = parts.get(root.operands[int(index[1])])
        if add is None or add.kind != "add":
            return 1
        steps = [_constant(parts.get(name)) for name in add.operands]
        return next((step for step in steps if step), 1)


@dataclasses.dataclass(frozen=True)
class _Shape:
    bytes: int
    space: int
    sides: tuple[int, ...]


def hbm(shape: str, any_space: bool = False) -> int:
    """Bytes of the arrays in a shape that lie in HBM, or in any memory."""
    return sum(array.bytes for array in _arrays(shape) if any_space or array.space == 0)


def _arrays(shape: str) -> list[_Shape]:
    found = []
    for kind, sides, layout in _ARRAY.findall(shape):
        width = _BYTES.get(kind) or (int(match[0]) // 8 if (match := re.findall(r"\d+$", kind)) else 0)
        lengths = tuple(int(side) for side in re.findall(r"\d+", sides))
        space = re.search(r"S\((\d+)\)", layout)
        found.append(_Shape(width * math.prod(lengths), int(space[1]) if space else 0, lengths))
    return found


def _parse(line: str) -> Op | None:
    head = _LINE.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    kind = rest.partition("(")[0]
    rest = rest[len(kind) :]
    close = _closing(rest)
    return Op(head[2], kind, shape, tuple(_NAME.findall(rest[:close])), rest[close + 1 :], bool(head[1]), rest[1:close])


def _closing(text: str) -> int:
    """The place of the bracket that closes the one at the start."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def _constant(op: Op | None) -> int | None:
    return int(op.raw_operands) if op is not None and op.kind == "constant" and op.raw_operands.isdigit() else None


def _handed_on(op: Op) -> set[int]:
    """The outputs of a fusion that are operands as they came, or the result of a collective begun before."""
    return {int(place or 0) for place in _ALIASED.findall(op.rest)}


def _carried(op: Op, body: list[Op]) -> set[str]:
    """The parts of a fusion that hand on a collective begun before, and read nothing."""
    if op.starts or not _ALIASED.search(op.rest):
        return set()
    return {part.name for part in body if part.kind in COLLECTIVES or (part.root and part.kind == "tuple")}


def _dot(op: Op, left: str, right: str) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    sides = _arrays(left)[0].sides
    inner = math.prod(sides[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
    return 2.0 * math.prod(_arrays(op.shape)[0].sides) * inner


def _convolution(op: Op, left: str, right: str) -> float:
    """Multiply-adds that meet data, times 2: XLA writes batched products as convolutions with much padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if labels is None:
        return 0.0
    lhs, rhs, out = (_arrays(shape)[0].sides for shape in (left, right, op.shape))
    window = {key: value for key, value in re.findall(r"(\w+)=([\dx_\-]+)", _window(op.rest))}
    groups = re.search(r"batch_group_count=(\d+)", op.rest)
    total = 2.0 * lhs[labels[1].index("b")] * out[labels[3].index("f")] * rhs[labels[2].index("i")]
    for axis in (letter for letter in labels[3] if letter.isdigit()):
        i = int(axis)
        total *= _overlap(
            lhs[labels[1].index(axis)], rhs[labels[2].index(axis)], out[labels[3].index(axis)],
            _side(window, "stride", i), _pad(window, i), _side(window, "lhs_dilate", i), _side(window, "rhs_dilate", i),
        )  # fmt: skip
    return total / (int(groups[1]) if groups else 1)


def _window(rest: str) -> str:
    match = re.search(r"window=\{([^}]*)\}", rest)
    return match[1] if match else ""


def _side(window: dict[str, str], key: str, axis: int) -> int:
    return int(window[key].split("x")[axis]) if key in window else 1


def _pad(window: dict[str, str], axis: int) -> int:
    return int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0


@functools.lru_cache(maxsize=4096)
def _overlap(lhs: int, kernel: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of an output and a kernel place that meet an element of the input and not padding."""
    last = (lhs - 1) * lhs_dilate
    count = 0
    for k in range(kernel):
        offset = k * rhs_dilate - pad
        if lhs_dilate == 1:  # every place inside the input is an element: count the outputs that land there
            low = (stride - 1 - offset) // stride if offset < 0 else 0
            count += max(0, min(out - 1, (last - offset) // stride) - low + 1) if last >= offset else 0
        else:
            places = range(offset, offset + out * stride, stride)
            count += sum(1 for place in places if 0 <= place <= last and place % lhs_dilate == 0)
    return count
