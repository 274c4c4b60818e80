"""The plans of the paper's stages on TPU slices: ``python benchmarks/pods.py`` makes docs/pods.md and docs/pods/*.json.

A cell that has its file is not compiled again (remove the file, or give --remake), so that the command can be stopped
and continued. Every cell is compiled for its slice on this machine; nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cocoa_jax.config import TrainConfig, load_config
from cocoa_jax.profiling.cells import Cells, MeasurementError, versions_of
from cocoa_jax.profiling.plan import plan_spec
from cocoa_jax.profiling.plan_report import GIB, memory_kinds, ratio, serial_seconds
from cocoa_jax.profiling.plan_search import changed
from cocoa_jax.profiling.topology import parse_topology

REPOSITORY = Path(__file__).parents[1]
FOLDER, PAGE = REPOSITORY / "docs/pods", REPOSITORY / "docs/pods.md"
BACKBONES = ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen2-vl-7b", "qwen2.5-vl-7b")
STAGES = ("1-warmup", "2-bridge", "3-contrastive")
SMALL = (("v5e:4x4", 1), ("v5p:2x2x4", 1), ("v6e:4x4", 1))  # 16 chips: all cells
FILLED = ("v5e:8x8", 1)  # what 1,024 pairs still fill: the last stage
FEWER = ("v5e:1x1", "v5e:2x2", "v5e:2x4")  # the smallest of these that fits
LARGE = (("v5e:16x16", 1), ("v5e:16x16", 2))  # multiplied batches
ENDS = (("qwen2-vl-2b", "lora"), ("qwen2-vl-7b", "full"))  # the least and the most to hold and send: there alone
SHARING = 16  # devices that share the parameters in configs/pods
POLICIES = ("products", "full")  # of compute.remat, the faster first
LEAST = ("full",)  # and where chips are fewest the one of least memory
BEGIN, END = "<!-- cells: written by benchmarks/pods.py -->", "<!-- end of cells -->"


@dataclass(frozen=True)
class Cell:
    """One stage of one backbone, with an adapter or in full, on one kind of slice."""

    backbone: str
    stage: str
    training: str
    topology: str
    slices: int

    @property
    def name(self) -> str:
        several = f"{self.slices}x" if self.slices > 1 else ""
        return f"{self.backbone}_{self.stage}_{self.training}_{several}{self.topology.replace(':', '-')}"

    @property
    def file(self) -> Path:
        """Where its plan is kept."""
        return FOLDER / f"{self.name}.json"

    @property
    def devices(self) -> int:
        return parse_topology(self.topology, self.slices)[1]

    def settings(self, remat: str) -> dict[str, Any]:
        """What is changed in the stage's config, beside the backbone the batch where the paper's has too few rows."""
        rows = load_config(TrainConfig, self.path).data.rows
        found: dict[str, Any] = {"checkpoint": f"configs/backbones/{self.backbone}", "compute.remat": remat}
        times = -(-self.devices // rows.shapes[0][0])
        if times > 1:
            found["data.rows.batch_size"] = rows.batch_size * times
            found["data.rows.shapes"] = tuple((n * times, t, p) for n, t, p in rows.shapes)
        if self.devices < SHARING:
            found |= {"mesh.fsdp": self.devices, "compute.chunk_rows": 1}
        return found

    @property
    def policies(self) -> tuple[str, ...]:
        """Of ``compute.remat``, in the order in which they are tried."""
        return POLICIES if self.devices >= SHARING else LEAST

    @property
    def path(self) -> Path:
        return REPOSITORY / f"configs/pods/{self.stage}-{self.training}.yaml"

    def command(self, remat: str) -> str:
        words = shlex.join(
            f"--{name}={json.dumps(value) if isinstance(value, tuple) else value}"
            for name, value in self.settings(remat).items()
        )
        more = f" --slices {self.slices}" if self.slices > 1 else ""
        return f"cocoa plan --config configs/pods/{self.path.name} --topology {self.topology}{more} {words}"


def all_cells() -> list[Cell]:
    """In the order in which they are made: adapters first, the small slice and backbone first."""
    orders = itertools.product((SMALL[0], FILLED, *SMALL[1:], *LARGE), ("lora", "full"), BACKBONES, STAGES)
    return [
        Cell(backbone, stage, how, *where)
        for where, how, backbone, stage in orders
        if _is_planned(where, how, backbone, stage)
    ]


def _is_planned(where: tuple[str, int], how: str, backbone: str, stage: str) -> bool:
    """Whether the table has this place for a stage: not where its batch would leave chips idle."""
    if where in LARGE:
        return (backbone, how) in ENDS
    return where in SMALL or (stage == STAGES[-1] and how == "lora")


def with_fewer(cells: list[Cell]) -> list[Cell]:
    """``cells``, and after them the fewest chips of v5e that hold the state of each stage.

    Where those turn out to be too few for its step, the next slice comes after them.
    """
    return cells + [fewer for cell, kept in made(cells) for fewer in _fewer(cell, kept["result"])]


def _fewer(cell: Cell, result: dict[str, Any]) -> Iterator[Cell]:
    if (cell.topology, cell.slices) != SMALL[0] or not result["fits"]:
        return
    held = sum(result["held"].values())
    for topology in FEWER:
        candidate = dataclasses.replace(cell, topology=topology)
        if held * cell.devices / candidate.devices <= result["capacity"]:
            yield candidate
            if all(kept["result"]["fits"] for _, kept in made([candidate])):
                return


def made(cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for cell in cells:
        if cell.file.is_file():
            yield cell, json.loads(cell.file.read_text())


def make(cell: Cell) -> None:
    """Compile a cell with the first remat policy that fits, and write its file."""
    for remat in cell.policies:
        config = changed(load_config(TrainConfig, cell.path), cell.settings(remat))
        spec = plan_spec(config, cell.topology, cell.slices)
        result = Cells(None).get(spec)
        if result["fits"]:
            break
    FOLDER.mkdir(parents=True, exist_ok=True)
    aside = FOLDER / f"{cell.name}.partial"
    found = {"command": cell.command(remat), "remat": remat, "versions": versions(cell), "result": result}
    aside.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(aside, cell.file)


def versions(cell: Cell) -> dict[str, str]:
    """Of the compiler, and digests of the code and of the settings that a cell is made with."""
    files = (cell.path, REPOSITORY / f"configs/backbones/{cell.backbone}/config.json")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    return {**versions_of({"program": "plan", "topology": cell.topology}), "settings": digest}


def table(cells: list[Cell]) -> str:
    """The cells that are there, and the number of those that are not."""
    lines = [
        "| backbone | stage | trained | slice | mesh | remat | batch | memory, GiB | MXU, ms | chip, ms | sent, ms "
        "| at least, ms | to MXU | bound by |",
        "| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    there = list(made(cells))
    for cell, kept in there:
        r = kept["result"]
        mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
        where = f"{cell.slices} x {cell.topology}" if cell.slices > 1 else cell.topology
        name = f"[{cell.backbone}](pods/{cell.name}.json)"
        memory = f"{r['needed'] / GIB:.1f} of {r['capacity'] / GIB:.2f}"
        first = [name, cell.stage, cell.training, where, mesh, kept["remat"], f"{r['examples']:,}", memory]
        if r["fits"]:
            sent = r["interconnect_seconds"] + r["network_seconds"]
            times = [r["mxu_seconds"], r["chip_seconds"], sent, r["step_seconds"]]
            rest = [*(f"{seconds * 1e3:,.0f}" for seconds in times), f"{ratio(r):.2f}", r["bound"]]
        else:
            rest = ["does not fit", *[""] * 5]
        lines.append("| " + " | ".join([*first, *rest]) + " |")
    missing = [cell.name for cell in cells if not cell.file.is_file()]
    text = f"\n{len(there)} of {len(cells)} cells are made."
    other = [cell.name for cell, kept in there if kept["versions"] != versions(cell)]
    if other:
        text += f" Of other versions of the code or the compiler than are here now: {', '.join(other)}."
    if missing:
        text += f" The command goes on with {', '.join(missing[:3])}."
    return "\n".join(lines) + "\n" + text + "\n"


def memory_table(cells: list[Cell]) -> str:
    """Memory of a device by kind, GiB."""
    there = [(cell, kept["result"]) for cell, kept in made(cells)]
    kinds = list(dict.fromkeys(kind for _, result in there for kind in memory_kinds(result)))
    lines = ["| cell | " + " | ".join(kinds) + " | nothing hidden, ms |", "| --- |" + " ---: |" * (len(kinds) + 1)]
    for cell, result in there:
        held = memory_kinds(result)
        sizes = [f"{held[kind] / GIB:.2f}" if kind in held else "-" for kind in kinds]
        serial = f"{serial_seconds(result) * 1e3:,.0f}" if result["fits"] else "-"
        lines.append(f"| {cell.name} | " + " | ".join(sizes) + f" | {serial} |")
    return "\n".join(lines) + "\n"


def write_page() -> None:
    """Put the tables between the marks of the page."""
    cells = with_fewer(all_cells())
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(cells)}\n{memory_table(cells)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="words that the names of the cells must have, such as 2b,v5e-4x4")
    parser.add_argument("--limit", type=int, default=None, help="how many cells to compile at most")
    parser.add_argument("--remake", action="store_true", help="compile cells that are there again")
    parser.add_argument("--table", action="store_true", help="compile nothing, write the page from the files")
    given = parser.parse_args()
    words = [word for word in given.only.split(",") if word]

    def left() -> list[Cell]:
        asked = [cell for cell in with_fewer(all_cells()) if all(word in cell.name for word in words)]
        return [cell for cell in asked if cell not in tried and (given.remake or not cell.file.is_file())]

    tried: list[Cell] = []
    write_page()
    with tqdm(total=len(left()), unit="cell", disable=given.table) as bar:
        while not given.table and len(tried) != given.limit and (cells := left()):
            tried.append(cells[0])
            try:
                make(cells[0])
            except (MeasurementError, ValueError) as error:
                tqdm.write(f"{cells[0].name}: {error}")
            write_page()
            bar.total = len(tried) + len(left())
            bar.update()


if __name__ == "__main__":
    main()
