"""Profiles as Markdown, JSON and drawings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from cocoa_jax.profiling.attention import MEASURED, Row
from cocoa_jax.profiling.model import LABEL

_COLOURS = {
    "reference": "#8a8a8a",
    "blockwise": "#b07aa1",
    "splash": "#4e79a7",
    "flash_tpu": "#e15759",
    "windowed": "#f28e2b",
}
MODEL_NOTE = (
    "Static model: the largest of issue cycles / clock, FLOPs / peak and bytes / bandwidth of each kernel. It is the "
    "least time that the compiled program can take, not a measurement."
)
MEASURED_NOTE = "Measured: the median of 10 calls after 3, wall time of the whole program on the named device."


def attention_markdown(rows: Sequence[Row]) -> str:
    """The table of ``profile_attention``, with what its figures are."""
    if not rows:
        return "no rows\n"
    kind, device = rows[0].kind, rows[0].device
    passes = "forward and backward" if rows[0].backward else "forward"
    note = MODEL_NOTE if kind == LABEL else MEASURED_NOTE
    first = rows[0]
    shape = (
        f"{first.heads} query and {first.kv_heads} key heads of width {first.width}, batch of {first.rows}, bfloat16"
    )
    head = [f"Attention on {device}, {passes}, {kind}: {shape}", "", note, ""]
    names = ["mask", "T", "implementation", "blocks", "tiles visited", "masked", "GFLOP", "MiB in HBM", "temporary MiB"]
    names += ["issue ms", f"{kind} ms", "beside ms", "to splash"]
    lines = [_line(names), _line(["---"] * 3 + ["---"] + ["---:"] * 9)]
    for row in rows:
        modelled = row.kind == LABEL
        lines.append(
            _line(
                [
                    row.mask,
                    str(row.length),
                    row.implementation,
                    row.blocks or "-",
                    f"{row.visited} of {row.total}" if row.total > 1 else "all",
                    str(row.masked) if row.total > 1 else "all",
                    f"{row.flops / 1e9:.1f}" if row.flops else "-",
                    f"{row.bytes / 2**20:.1f}" if modelled else "-",
                    f"{row.temporary / 2**20:.1f}",
                    f"{row.issue * 1e3:.3f}" if modelled else "-",
                    f"{row.seconds * 1e3:.3f}",
                    f"{row.around * 1e3:.3f}" if modelled else "-",
                    f"{row.to_splash:.2f}" if row.to_splash else "-",
                ]
            )
        )
    return "\n".join(head + lines) + "\n"


def write_attention(rows: Sequence[Row], output: str | Path) -> list[Path]:
    """``attention.md``, ``attention.json`` and ``attention.svg`` in a folder."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    text, values, drawing = (folder / f"attention.{kind}" for kind in ("md", "json", "svg"))
    text.write_text(attention_markdown(rows))
    values.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    plot_attention(rows, drawing)
    return [text, values, drawing]


def plot_attention(rows: Sequence[Row], path: Path) -> None:
    """Time by length, a panel for each mask; what kind of figure it is stands on the axis."""
    from matplotlib.figure import Figure

    masks = list(dict.fromkeys(row.mask for row in rows))
    figure = Figure(figsize=(3.1 * len(masks) + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(masks), sharey=True, squeeze=False)[0]
    for axis, mask in zip(axes, masks, strict=True):
        for name in dict.fromkeys(row.implementation for row in rows):
            own = sorted(
                (row.length, row.seconds * 1e3) for row in rows if (row.mask, row.implementation) == (mask, name)
            )
            if own:
                axis.plot(*zip(*own, strict=True), marker="o", label=name, color=_COLOURS.get(name, "#59a14f"))
        axis.set(title=mask, xlabel="tokens in a row", xscale="log", yscale="log")
        lengths = sorted({row.length for row in rows})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    kind = rows[0].kind
    axes[0].set_ylabel(f"ms, {kind}" + ("" if kind == MEASURED else " (not measured)"))
    axes[0].legend(frameon=False)
    passes = "forward and backward" if rows[0].backward else "forward"
    figure.suptitle(f"{rows[0].device}, {passes}, {rows[0].kind}")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
