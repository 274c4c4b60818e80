"""Drawings of the report as inline SVG; colours come from the style sheet, by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from cocoa_jax.evaluation.markup import Element, element

Scale = Callable[[float], float]

# The coordinates of a drawn path; more points than this cannot be told apart at the size of a panel.
_POINTS = 320
_WIDTH, _HEIGHT = 340, 214
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 48, 12, 26
_CELL = 13


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them, at a step of 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """A centred Gaussian mean over about a thirtieth of the curve, shorter where the curve begins and ends."""
    width = len(values) / 60
    reach = round(3 * width)
    if reach < 1:
        return values
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    whole = np.convolve(np.pad(values, reach), kernel, mode="valid")
    return whole / np.convolve(np.pad(np.ones_like(values), reach), kernel, mode="valid")


def curve_chart(steps: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"], title: str) -> Element:
    """One panel: the values faintly, their smoothed course on top with its last value; finite values, at least two."""
    course = smooth(values)
    # A single spike does not set the scale: the line leaves the panel there and is cut.
    low, high = min(course.min(), np.percentile(values, 1)), max(course.max(), np.percentile(values, 99))
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - margin, high + margin
    x = _scale(steps.min(), steps.max(), _LEFT, _WIDTH - _RIGHT)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    box = {"x": _LEFT, "y": _TOP, "width": _WIDTH - _LEFT - _RIGHT, "height": _HEIGHT - _TOP - _BOTTOM}
    nodes = [element("title", {}, f"{title}: from {_short(course[0])} to {_short(course[-1])}")]
    for tick in nice_ticks(low, high):
        at = y(tick)
        nodes.append(element("line", {"class": "grid", "x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": at, "y2": at}))
        nodes.append(element("text", {"class": "tick end", "x": _LEFT - 7, "y": at + 3.5}, _short(tick)))
    for tick in nice_ticks(float(steps.min()), float(steps.max()), 4):
        nodes.append(element("text", {"class": "tick mid", "x": x(tick), "y": _HEIGHT - 8}, f"{tick:,.0f}"))
    nodes.append(
        element(
            "svg",
            {**box, "viewBox": f"{box['x']} {box['y']} {box['width']} {box['height']}"},
            element("path", {"class": "raw", "d": _path(steps, values, x, y)}),
            element("path", {"class": "course", "d": _path(steps, course, x, y)}),
        )
    )
    end_x, end_y = x(steps[-1]), y(course[-1])
    nodes.append(element("circle", {"class": "dot", "cx": end_x, "cy": end_y, "r": 3.2}))
    nodes.append(element("text", {"class": "value", "x": end_x + 8, "y": end_y + 4}, _short(course[-1])))
    return element("svg", {"class": "curve", "viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img"}, *nodes)


def sparkline(steps: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"], title: str) -> Element:
    """A small line without axes; finite values, at least two."""
    course = smooth(values)
    x, y = _scale(steps.min(), steps.max(), 2, 98), _scale(course.min(), course.max(), 22, 3)
    return element(
        "svg",
        {"class": "spark", "viewBox": "0 0 100 25", "preserveAspectRatio": "none", "role": "img"},
        element("title", {}, f"{title}: from {_short(course[0])} to {_short(course[-1])}"),
        element("path", {"class": "course", "d": _path(steps, course, x, y)}),
    )


def last_value(values: Float[np.ndarray, " n"]) -> str:
    """Where the smoothed course ends, in three figures."""
    return _short(smooth(values)[-1])


def matrix_chart(mask: Bool[np.ndarray, "T T"], kinds: Sequence[str], title: str) -> Element:
    """Queries down, keys across: a filled cell for every key that a query sees, in the colour of the key.

    `kinds` names what each slot holds: "a", "b" (blocks or documents), "eos" or "pad"; an empty row is padding.
    """
    count, offset = len(kinds), _CELL + 5
    side = offset + count * _CELL
    nodes = [element("title", {}, title)]
    for slot, kind in enumerate(kinds):
        at = offset + slot * _CELL
        head: dict[str, str | float] = {"class": f"slot {kind}", "width": _CELL - 2, "height": _CELL - 2, "rx": 3.5}
        nodes.append(element("rect", {**head, "x": at, "y": 1}))
        nodes.append(element("rect", {**head, "x": 1, "y": at}))
    for query in range(count):
        for key in range(count):
            seen = bool(mask[query, key])
            cell = {"x": offset + key * _CELL, "y": offset + query * _CELL, "width": _CELL - 2, "height": _CELL - 2}
            nodes.append(element("rect", {"class": f"cell {kinds[key]}" if seen else "cell", **cell, "rx": 1.5}))
    return element("svg", {"class": "matrix", "viewBox": f"0 0 {side} {side}", "role": "img"}, *nodes)


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """The linear map that takes [low, high] to the coordinates [start, end]."""
    slope = (end - start) / (float(high - low) or 1.0)
    return lambda value: start + (float(value) - float(low)) * slope


def _path(steps: np.ndarray, values: np.ndarray, x: Scale, y: Scale) -> str:
    stride = max(1, math.ceil(len(steps) / _POINTS))
    kept = np.unique(np.append(np.arange(0, len(steps), stride), len(steps) - 1))
    return "M" + "L".join(f"{x(steps[i]):.1f} {y(values[i]):.1f}" for i in kept)


def _short(value: float) -> str:
    """Three significant figures, without an exponent where a reader would not expect one."""
    value = float(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
