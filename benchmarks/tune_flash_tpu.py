"""Block sizes of the TPU attention kernels: the static model of every candidate, and the table that follows from it.

python benchmarks/tune_flash_tpu.py --cells runs/tune --chips v5e,v5p,v6e --widths 128,80

Each candidate is compiled once per chip and head width, in a process of its own, and kept in the folder of cells; what
its parts cost is then multiplied by the tiles of every mask and length. No figure here is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cocoa_jax.attention.spans import Spans, segments
from cocoa_jax.attention.tiles import Blocks, count_tiles, query_hulls
from cocoa_jax.chips import CHIPS, Chip
from cocoa_jax.profiling.llo import FLAGS, Program, dumped
from cocoa_jax.profiling.masks import mask_spans
from cocoa_jax.profiling.topology import ENVIRONMENT, tpu_slice

CANDIDATES = ((512, 512), (256, 512), (256, 256), (128, 128))
HEADS = {128: (12, 2), 80: (16, 16), 64: (16, 16)}  # query and key heads: the text tower, the vision tower
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
COMPILED = (8, 4096)  # rows and length of the compiled call: too much for XLA to keep in vector memory by itself
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KERNELS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of the parts of one kernel: outside of the grid, and per step, row, query block and tile of a group."""

    once: float
    step: float
    row: float
    block: float
    unmasked: float
    masked: float


def masks(width: int, length: int) -> dict[str, Spans]:
    """What a call of this head width is used for."""
    if width == 128:
        return {name: mask_spans(name, length) for name in ("full", "bridge", "packed-bridge")}
    windows = segments([64] * (length // 64), length)
    found = {name: mask_spans(name, length) for name in ("full", "packed")}
    return found | {"windows": Spans(windows.start[None], windows.end[None])}


def compile_here(chip: str, width: int, blocks: Blocks, dump: Path) -> dict[str, dict[str, float]]:
    """Compile forward and backward and read what their parts cost; libtpu dumps into ``dump``."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from cocoa_jax.attention import flash_tpu
    from cocoa_jax.attention.flash_tpu_blocks import Tuning

    (N, K), (B, T) = HEADS[width], COMPILED
    mesh = Mesh(np.array(tpu_slice(TOPOLOGY[chip]).devices[:1]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((B, T, heads, width), jnp.bfloat16, sharding=place) for heads in (N, K))
    bound = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=place)
    sizes = Tuning(blocks, blocks, 6)

    def run(q: Any, k: Any, v: Any, start: Any, end: Any, gradient: Any) -> Any:
        spans = Spans(start, end)
        out, pull = jax.vjp(lambda *args: flash_tpu.attend(*args, spans, width**-0.5, sizes=sizes), q, k, v)
        return out, pull(gradient)

    with jax.set_mesh(mesh):
        jax.jit(run).lower(q, k, k, bound, bound, q).compile()
    costs = {}
    for name, path in dumped(dump).items():
        kernel = next((kernel for kernel in KERNELS if name.startswith(f"span_attention_{kernel}")), None)
        if kernel:
            parts = Program(path.read_text()).parts
            if len(parts.compute) != 2:
                raise SystemExit(f"{name}: {len(parts.compute)} compute regions, expected masked and unmasked")
            row = parts.begin[0] + (parts.finish[1] if kernel == "backward" else 0)
            block = sum(parts.begin[1:]) + parts.finish[0]
            clear, hidden = (part.cycles for part in parts.compute)
            step = parts.step + sum(cycles for cycles, _ in parts.copies)
            costs[kernel] = dataclasses.asdict(Cost(parts.once, step, row, block, clear, hidden))
    return costs


def cell(chip: str, width: int, blocks: Blocks, folder: Path) -> dict[str, Cost] | None:
    """The costs of a candidate: kept from before, or compiled now in a process of its own; None if it does not fit."""
    path = folder / f"{chip}_{width}_{blocks.query}x{blocks.key}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as dump:
            environment = {**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": FLAGS.format(folder=dump)}
            spec = json.dumps([chip, width, *blocks, dump, str(path)])
            command = [sys.executable, __file__, "--compile", spec]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(f"{path.name}: {done.stderr.strip()[-300:]}\n")
            return None
    return {name: Cost(**cost) for name, cost in json.loads(path.read_text()).items()}


def seconds(cost: Cost, kernel: str, chip: Chip, width: int, spans: Spans, blocks: Blocks) -> float:
    """The static model of one call on one row: the largest of issue, matrix products and bytes."""
    N, K = HEADS[width]
    groups, T = K * max(1, N // K // 6), spans.start.shape[-1]
    tiles, hulls = count_tiles(spans, T, blocks), query_hulls(spans, T, blocks)
    listed = int(np.maximum(hulls.hi - hulls.lo, 1).sum())
    cores = chip.cores if groups % chip.cores == 0 else 1
    work = listed * cost.step + cost.row * T / COMPILED[1] + hulls.lo.size * cost.block
    work += (tiles.visited - tiles.masked) * cost.unmasked + tiles.masked * cost.masked
    cycles = cost.once + 2 * cost.step + groups * work / cores
    products = {"forward": 4, "backward": 10}[kernel]
    flops = products * tiles.visited * blocks.query * blocks.key * N * width
    lanes = -(-width // 128) * 128
    moved = 2 * lanes * ((2 if kernel == "forward" else 3) * N * T + 2 * groups * listed * blocks.key)
    return max(cycles / chip.clock, flops / chip.peak_flops, moved / chip.hbm_bandwidth)


def best(chip: str, width: int, costs: dict[Blocks, dict[str, Cost]]) -> list[str]:
    """Markdown lines: the tile with the least total time over the masks, and all times in ms."""
    lines = []
    for length in LENGTHS:
        spans = masks(width, length)
        for kernel in KERNELS:
            fitting = [blocks for blocks in costs if max(blocks) <= length]
            times = {
                blocks: [seconds(costs[blocks][kernel], kernel, CHIPS[chip], width, s, blocks) for s in spans.values()]
                for blocks in fitting
            }
            ranked = sorted(fitting, key=lambda blocks: sum(times[blocks]))
            shown = "; ".join(
                f"{blocks.query}x{blocks.key}: " + ", ".join(f"{name} {1e3 * t:.4f}" for name, t in pairs)
                for blocks in ranked
                for pairs in [zip(spans, times[blocks], strict=True)]
            )
            lines.append(f"| {chip} | {width} | {length} | {kernel} | {ranked[0].query}x{ranked[0].key} | {shown} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Path, default=Path("runs/tune"))
    parser.add_argument("--chips", default="v5e,v5p,v6e")
    parser.add_argument("--widths", default="128,80,64")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.compile:
        chip, width, query, key, dump, answer = json.loads(asked.compile)
        Path(answer).write_text(json.dumps(compile_here(chip, width, Blocks(query, key), Path(dump))) + "\n")
        return
    sys.stdout.write(
        "| chip | width | length | kernel | tile | static model, ms, best tile first |\n|---|---|---|---|---|---|\n"
    )
    for chip in asked.chips.split(","):
        for width in map(int, asked.widths.split(",")):
            found = {Blocks(*c): cell(chip, width, Blocks(*c), asked.cells) for c in CANDIDATES}
            costs = {blocks: cost for blocks, cost in found.items() if cost}
            sys.stdout.write("\n".join(best(chip, width, costs)) + "\n")


if __name__ == "__main__":
    main()
