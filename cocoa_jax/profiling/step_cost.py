"""What a whole train step costs on a TPU slice: memory, FLOPs, issue time, interconnect, compile time."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cocoa_jax.attention import spans
from cocoa_jax.attention.divide import own_heads
from cocoa_jax.attention.spans import Spans
from cocoa_jax.chips import Chip
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.models.config import Qwen2VLConfig, VisionConfig
from cocoa_jax.models.spread import row_chunks
from cocoa_jax.profiling.collectives import by_axis, collectives, seconds_sent
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.kernels import SpanCall, mean_work, span_calls
from cocoa_jax.profiling.model import LABEL, KernelTable, OpCost, ProgramCost, program_cost
from cocoa_jax.profiling.steps import abstract_batch, abstract_step, parameter_count, read_backbone, step_mesh
from cocoa_jax.profiling.topology import parse_topology, tpu_slice
from cocoa_jax.training.mesh import AXES, batch_shards, mesh_sizes

TOP = 12  # operations that are named


def step_spec(config: dict[str, Any], topology: str, slices: int) -> dict[str, Any]:
    """What ``cells`` measures for a train step; ``config`` as ``to_dict`` writes it."""
    return {"program": "step", "stage": config["stage"], "topology": topology, "slices": slices, "config": config}


def check_step(config: TrainConfig, topology: str, slices: int) -> None:
    """Refuse what cannot be compiled before a process is started for it.

    Raises:
        TopologyError: an unknown topology.
        ConfigError: the backbone's folder holds no config.
        ValueError: a mesh, rows or chunks that do not fit.
    """
    read_backbone(config.checkpoint)
    row_chunks(own_rows(config, topology, slices), config.compute.chunk_rows)


def own_rows(config: TrainConfig, topology: str, slices: int) -> int:
    """Rows of the widest shape that one device has.

    Raises:
        TopologyError: an unknown topology.
        ValueError: a mesh that is not one of these devices, or rows that they cannot share.
    """
    *shards, _ = mesh_sizes(config.mesh, parse_topology(topology, slices)[1], slices)
    rows = config.data.rows
    rows.check_shared(math.prod(shards), "devices")
    return rows.widest.rows // math.prod(shards)


def model_step(spec: Mapping[str, Any], dump: Path) -> dict[str, Any]:
    """Compile the step of a spec and cost it; run by ``worker`` with libtpu dumping into ``dump``."""
    config = parse(TrainConfig, spec["config"])
    target, backbone = tpu_slice(spec["topology"], spec["slices"]), read_backbone(config.checkpoint)
    mesh = step_mesh(config, target)
    step, state, batch = abstract_step(config, backbone, mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
        lowering = time.perf_counter() - began
        compiled = lowered.compile()
    compiling = time.perf_counter() - began - lowering
    module = Module(compiled.as_text())
    cost = program_cost(module, dump, target.chip, row_kernels(config, backbone, mesh, target.chip))
    sizes = dict(zip(AXES, mesh.devices.shape, strict=True))
    sent = by_axis(collectives(module, sizes))
    times_sent = seconds_sent(sent, target.ici_bandwidth, target.chip.dcn_bandwidth)
    memory = compiled.memory_analysis()
    return {
        "stage": config.stage,
        "topology": spec["topology"],
        "slices": spec["slices"],
        "devices": len(target.devices),
        "mesh": sizes,
        "batch": {name: list(abstract_batch(config, backbone, mesh)[name].shape) for name in ("tokens", "patches")},
        "parameters": parameter_count(state),
        "memory": {
            "peak": memory.peak_memory_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "capacity": target.chip.hbm_bytes,
        },
        **_times(cost),
        "sent": [dict(zip(("kind", "axis", "sites", "runs", "bytes"), row, strict=True)) for row in sent],
        **dict(zip(("interconnect_seconds", "network_seconds"), times_sent, strict=True)),
        "lower_seconds": lowering,
        "compile_seconds": compiling,
    }


def row_kernels(config: TrainConfig, backbone: Qwen2VLConfig, mesh: Mesh, chip: Chip) -> KernelTable:
    """What the span kernels do in a full batch: documents of equal length fill its rows.

    Stage 2 truncates each at three quarters. What a device's share of rows and heads does not divide, stays whole.
    """
    if importlib.util.find_spec("cocoa_jax.attention.flash_tpu") is None:
        return {}
    rows, text, vision = config.data.rows, backbone.text, backbone.vision
    B, T, P = rows.widest
    examples = rows.batch_size * (2 + config.data.negatives if config.stage == "contrastive" else 1)
    E = min(rows.examples_per_row, -(-examples // B))
    share, tensor = B // batch_shards(mesh), mesh.shape["tensor"]
    if config.compute.chunk_rows:
        share = min(share, config.compute.chunk_rows)
    segments = spans.segments([T // E] * E, T)
    seen = segments
    if config.stage == "bridge":
        at = segments.start + (segments.end - segments.start) * 3 // 4
        seen = spans.truncated(segments, Spans(at, at + 1), strict=config.data.visibility.strict_bridge)
    elif config.data.visibility.attention == "causal":
        seen = spans.causal(segments)
    table: dict[str, Any] = {}
    for tower, layers, heads, kv, width in (
        ("text", [seen], text.heads, text.kv_heads, text.head_width),
        (
            "vision",
            _vision_layers(P, E, vision) if P else [],
            vision.heads,
            vision.heads,
            vision.width // vision.heads,
        ),
    ):
        calls: dict[str, list[SpanCall]] = {}
        for one in layers:
            whole = Spans(*(np.tile(side, (share, 1)) for side in (one.start, one.end)))
            for name, some in span_calls(whole, *own_heads(heads, kv, tensor), width, chip.kind, chip.cores).items():
                calls.setdefault(name, []).extend(some)
        works = {name: mean_work(some) for name, some in calls.items()}
        # The stage-1 decoder is one more layer of the text tower.
        for owner in ("text", "decoder") if tower == "text" else (tower,):
            table |= {f"{owner}/{name}": work for name, work in works.items()}
    return table


def _vision_layers(length: int, pictures: int, vision: VisionConfig) -> list[Spans]:
    """What the patches of a row that holds so many pictures see in each layer: their picture, or their window."""
    patches = length // pictures
    whole = spans.segments([patches] * pictures, length)
    if not vision.window:
        return [whole]
    width = (vision.window // vision.patch_size) ** 2
    sizes = ([width] * (patches // width) + [patches % width] * (patches % width > 0)) * pictures
    windows = spans.segments(sizes, length)
    return [whole if layer in vision.full_layers else windows for layer in range(vision.layers)]


def _times(cost: ProgramCost) -> dict[str, Any]:
    chip = cost.chip
    ranked = sorted(cost.ops, key=lambda op: -op.seconds(chip))[:TOP]
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "mxu_seconds": cost.flops / chip.peak_flops,
        "issue_seconds": cost.issue_seconds,
        "seconds": cost.seconds,
        "unknown": list(cost.unknown),
        "missing": list(cost.missing),
        "top": [_named(op, chip) for op in ranked],
        "scopes": _scopes(cost),
        "kernels": sorted({f"{_place(op)}/{op.name.partition('.')[0]}" for op in cost.kernels}),
    }


def _named(op: OpCost, chip: Chip) -> dict[str, Any]:
    issue, seconds = op.issue_seconds(chip), op.seconds(chip)
    return {"name": op.name, "scope": op.scope, "runs": op.runs, "issue_seconds": issue, "seconds": seconds}


def _scopes(cost: ProgramCost) -> dict[str, float]:
    """Seconds by the named scopes of the source, such as ``stage2/text/attention``."""
    found: dict[str, float] = {}
    for op in cost.ops:
        name = _place(op)
        found[name] = found.get(name, 0.0) + op.seconds(cost.chip)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _place(op: OpCost) -> str:
    words = [word for word in op.scope.replace("(", "/").replace(")", "/").split("/") if word in SCOPES]
    return "/".join(dict.fromkeys(words)) or "other"


SCOPES = frozenset(
    [
        "stage1",
        "stage2",
        "stage3",
        "text",
        "vision",
        "attention",
        "mlp",
        "decoder",
        "loss",
        "embed",
        "merger",
        "optimizer",
    ]
)


def step_markdown(result: Mapping[str, Any]) -> str:
    """The figures of ``model_step`` as Markdown."""
    memory, name = result["memory"], f"{result['slices']} x " if result["slices"] > 1 else ""
    tokens, patches = (result["batch"][key] for key in ("tokens", "patches"))
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    lines = [
        f"Train step of stage {result['stage']} on {name}{result['topology']} ({result['devices']} devices: {mesh})",
        "",
        f"{LABEL}: compiled for that slice, not run. Times are the least that the compiled program can take.",
        "",
        f"* {result['parameters']:,} parameters; {tokens[0]} rows of {tokens[1]} tokens and {patches[1]} patches",
        f"* memory of a device: {_gib(memory['peak'])} at the peak of {_gib(memory['capacity'])}; state and batch "
        f"{_gib(memory['arguments'])}, temporary {_gib(memory['temporary'])}",
        f"* {result['flops'] / 1e12:.2f} TFLOP a device, recomputation included: ideal MXU time "
        f"{_ms(result['mxu_seconds'])}",
        f"* {LABEL}: {_ms(result['seconds'])}; issue time {_ms(result['issue_seconds'])}; "
        f"{result['bytes'] / 2**30:.1f} GiB through HBM",
        f"* sent by each device: {sum(row['bytes'] for row in result['sent']) / 2**20:,.0f} MiB; not hidden, "
        f"{_ms(result['interconnect_seconds'])} in its slice and {_ms(result['network_seconds'])} between slices",
        f"* lowered in {result['lower_seconds']:.1f} s and compiled in {result['compile_seconds']:.1f} s, here",
    ]
    lines.append(f"* Pallas kernels: {', '.join(result['kernels']) or 'none'}")
    if result["unknown"]:
        lines.append(f"* loops whose length the data decide, counted once: {', '.join(result['unknown'])}")
    if result["missing"]:
        lines.append(f"* instructions that the compiler did not show, not counted: {', '.join(result['missing'])}")
    lines += ["", "| collective | mesh axis | sites | runs | MiB sent |", "| --- | --- | ---: | ---: | ---: |"]
    for row in result["sent"]:
        sent = f"{row['bytes'] / 2**20:,.1f}"
        lines.append(f"| {row['kind']} | {row['axis']} | {row['sites']} | {row['runs']} | {sent} |")
    lines += ["", f"| scope | ms, {LABEL} |", "| --- | ---: |"]
    lines += [f"| {scope} | {seconds * 1e3:.2f} |" for scope, seconds in result["scopes"].items()]
    lines += ["", f"| operation | runs | issue ms | ms, {LABEL} | where |", "| --- | ---: | ---: | ---: | --- |"]
    for op in result["top"]:
        times = f"{op['issue_seconds'] * 1e3:.2f} | {op['seconds'] * 1e3:.2f}"
        lines.append(f"| {op['name']} | {op['runs']:.0f} | {times} | `{op['scope'][-70:]}` |")
    return "\n".join(lines) + "\n"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
