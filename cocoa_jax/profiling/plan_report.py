"""Plans as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cocoa_jax.profiling.model import LABEL
from cocoa_jax.profiling.plan import NEXT
from cocoa_jax.profiling.plan_search import Tried

GIB, MIB = 2.0**30, 2.0**20


def plan_markdown(result: Mapping[str, Any]) -> str:
    """The figures of ``plan_step``."""
    several = f"{result['slices']} x " if result["slices"] > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    tokens, patches = (result["batch"][key] for key in ("tokens", "patches"))
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines = [
        f"Stage {result['stage']} on {several}{result['topology']} ({result['devices']} devices: {mesh}): {verdict}",
        "",
        f"{LABEL}: compiled for that slice, not run. Times are the least that the compiled program can take.",
        "",
        f"* a batch of {result['examples']} in {tokens[0]} rows of {tokens[1]} tokens and {patches[1]} patches",
        f"* memory of a device: {result['needed'] / GIB:.2f} GiB needed of {result['capacity'] / GIB:.2f} GiB",
    ]
    lines += [f"  * {name}: {size / GIB:.2f} GiB" for name, size in memory_kinds(result).items()]
    if not result["fits"]:
        return "\n".join(lines) + "\n"
    lines += [*_times(result), f"* compiled in {result['compile_seconds']:.0f} s, here"]
    if result["unknown"]:
        lines.append(f"* loops whose length the data decide, counted once: {', '.join(result['unknown'])}")
    if result["missing"]:
        lines.append(f"* instructions that the compiler did not show, not counted: {', '.join(result['missing'])}")
    lines += [
        "",
        "| collective | mesh axis | sites | runs | MiB a device sends |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in result["sent"]:
        lines.append(f"| {row['kind']} | {row['axis']} | {row['sites']} | {row['runs']} | {row['bytes'] / MIB:,.1f} |")
    return "\n".join(lines) + "\n"


def _times(result: Mapping[str, Any]) -> list[str]:
    spent = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in result["spent"].items())
    least, serial = _ms(result["step_seconds"]), _ms(serial_seconds(result))
    lines = [
        f"* {result['flops'] / 1e12:.2f} TFLOP a device, recomputation included: ideal MXU time "
        f"{_ms(result['mxu_seconds'])}",
        f"* chip, {LABEL}: {_ms(result['chip_seconds'])}, by what bounds each operation: {spent}; "
        f"{result['bytes'] / GIB:.1f} GiB through HBM",
        f"* interconnect, all links of the chip that has the fewest: {_ms(result['interconnect_seconds'])}",
        f"* **a step takes at least {least}**, {ratio(result):.2f} x the ideal MXU time, if all that is sent is "
        f"hidden behind the computation, {serial} if nothing is; bound by {result['bound']}",
    ]
    if result["slices"] > 1:
        lines.insert(3, f"* data-centre network: {_ms(result['network_seconds'])}")
    return lines


def memory_kinds(result: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of a device by what they are for; padding is what the compiler adds to what is held between steps."""
    held = {name: float(size) for name, size in result["held"].items()}
    if not result["fits"]:
        return {**held, "activations, gradients and padding": result["needed"] - sum(held.values())}
    padding = max(0.0, result["arguments"] - sum(size for name, size in held.items() if name != NEXT))
    return {**held, "padding": padding, "activations and gradients": result["needed"] - sum(held.values()) - padding}


def ratio(result: Mapping[str, Any]) -> float:
    """The least time of a step to its ideal MXU time."""
    return result["step_seconds"] / result["mxu_seconds"]


def serial_seconds(result: Mapping[str, Any]) -> float:
    """The time of a step that hides nothing that is sent."""
    return result["chip_seconds"] + result["interconnect_seconds"] + result["network_seconds"]


def search_markdown(tried: Sequence[Tried], count: int) -> str:
    """What fits, the fastest first."""
    lines = [f"{len(tried)} of {count} fit; {LABEL}, the least time of a step first", ""]
    lines += [
        "| settings | GiB | step at least, ms | nothing hidden, ms | bound by |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for one in tried:
        result = one.result
        times = f"{result['step_seconds'] * 1e3:.0f} | {serial_seconds(result) * 1e3:.0f}"
        lines.append(f"| `{one.words}` | {result['needed'] / GIB:.2f} | {times} | {result['bound']} |")
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
