"""What this project says of a layout, and how far it is from what transformers says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from layouts import Layout

from cocoa_jax.checkpoints.hub_layout import plan
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.qwen2_vl import Compute, bind, graph_of
from cocoa_jax.objectives.masked_text import masked_text_loss

Params = dict[str, Any]


@functools.cache
def forward(config: Qwen2VLConfig, dtype: str = "float32") -> Callable[[Params, dict[str, Any]], dict[str, Any]]:
    """The jitted forward pass, params and batch -> every state of both towers and the logits."""
    graph, _ = graph_of(config, Compute(dtype=dtype))

    def run(params: Params, batch: dict[str, Any]) -> dict[str, Any]:
        model, inputs = bind(graph, params), Inputs.from_batch(batch)
        made = {}
        if inputs.patches.shape[1]:
            spans = (inputs.patch_positions, inputs.patch_spans, inputs.window_spans)
            seen, entered = model.vision.states(inputs.patches.astype(dtype), *spans, remat="none")
            made = {f"vision{i}": x for i, x in enumerate(entered)}
            made |= {"vision": seen, "merged": model.vision.merger(seen)}
        last, entered = model.states(inputs)
        hidden = model.text.norm(last)
        made |= {f"hidden{i}": x for i, x in enumerate(entered)}
        made |= {"hidden": hidden, "logits": model.logits(hidden)}
        return {name: value.astype(jnp.float32) for name, value in made.items()}

    return jax.jit(run)


@functools.cache
def _loss(config: Qwen2VLConfig) -> Callable[..., tuple[Any, Params]]:
    graph, _ = graph_of(config)

    def loss(params: Params, batch: dict[str, Any], at: np.ndarray, ids: np.ndarray) -> Any:
        model = bind(graph, params)
        return masked_text_loss(model, model(Inputs.from_batch(batch)), at, ids)[0]

    return jax.jit(jax.value_and_grad(loss))


def loss_and_gradients(
    params: Params, layout: Layout, mask: str, at: np.ndarray, ids: np.ndarray
) -> tuple[float, dict[str, float]]:
    """The masked loss and the norm of every gradient by hub key."""
    config, vision = layout.config, layout.config.vision
    loss, gradients = _loss(config)(params, layout.ours(mask), at, ids)
    patch = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(gradients, sep=".").items()}
    norms = {}
    for key, slot in plan(params, patch).items():
        leaf = leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer]
        norms[key] = float(np.linalg.norm(np.float64(leaf)))
    return float(loss), norms


def real_parts(layout: Layout, states: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our states in the order of transformers, padding left out."""
    made = {}
    for name, value in states.items():
        if name.startswith("vision") or name == "merged":
            if len(layout.patch_slots[0]):
                made[name] = np.asarray(value)[layout.unit_slots if name == "merged" else layout.patch_slots]
        else:
            made[name] = np.asarray(value)[layout.real]
    return made


def their_parts(layout: Layout, states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same of the states of transformers."""
    text = ("hidden", "logits")
    return {name: value[layout.real] if name.startswith(text) else value for name, value in states.items()}


def largest(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest difference of each state, relative to the state's largest number."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    return {name: float(np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()) for name in want}


def root_mean_square(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """Root mean square of the difference of each state, relative to that of the state."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    return {name: float(np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])) for name in want}
