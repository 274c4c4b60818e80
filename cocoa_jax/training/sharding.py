"""Where every parameter lives: one table from its path to its PartitionSpec."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_WIDE = r"layers/(attention|mlp)/(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1)"  # maps that read D
_NARROW = r"layers/(attention|mlp)/(o_proj|proj|down_proj|fc2)"  # maps that give D

# The path of a leaf, its axes in letters, and the mesh axis of each. L layers are never split.
# Inputs of a map go over fsdp and outputs over tensor where the next map reads them split, else the reverse.
TABLE: tuple[tuple[str, str, P], ...] = (
    (r"text/embed/table", "V D", P("tensor", "fsdp")),
    (r"text/head/kernel", "D V", P("fsdp", "tensor")),
    (r"layers/attention/(q|k|v)_proj/kernel", "L D NH", P(None, "fsdp", "tensor")),
    (r"layers/attention/(q|k|v)_proj/bias", "L NH", P(None, "tensor")),
    (r"layers/attention/o_proj/kernel", "L NH D", P(None, "tensor", "fsdp")),
    (r"layers/attention/qkv/kernel", "L E 3E", P(None, "fsdp", "tensor")),
    (r"layers/attention/proj/kernel", "L E E", P(None, "tensor", "fsdp")),
    (r"layers/mlp/(gate_proj|up_proj|fc1)/kernel", "L D F", P(None, "fsdp", "tensor")),
    (r"layers/mlp/(down_proj|fc2)/kernel", "L F D", P(None, "tensor", "fsdp")),
    (r"vision/patch_embed/kernel", "C E", P(None, "fsdp")),
    (r"vision/merger/fc1/kernel", "4E 4E", P("fsdp", "tensor")),
    (r"vision/merger/fc2/kernel", "4E D", P("tensor", "fsdp")),
    # The stage-1 decoder: one layer, no leading L.
    (r"head/layer/attention/(q|k|v)_proj/kernel", "D NH", P("fsdp", "tensor")),
    (r"head/layer/attention/o_proj/kernel", "NH D", P("tensor", "fsdp")),
    (r"head/layer/mlp/(gate_proj|up_proj)/kernel", "D F", P("fsdp", "tensor")),
    (r"head/layer/mlp/down_proj/kernel", "F D", P("tensor", "fsdp")),
    (r"head/proj/kernel", "D W", P("fsdp", "tensor")),
    # Adapters: the rank is never split, inputs and outputs lie as those of the map.
    (rf"{_WIDE}/a", "L D R", P(None, "fsdp", None)),
    (rf"{_WIDE}/b", "L R F", P(None, None, "tensor")),
    (rf"{_WIDE}/magnitude", "L F", P(None, "tensor")),
    (rf"{_NARROW}/a", "L F R", P(None, "tensor", None)),
    (rf"{_NARROW}/b", "L R D", P(None, None, "fsdp")),
    (rf"{_NARROW}/magnitude", "L D", P(None, "fsdp")),
    # Of the merger, and trained rows of the embedding: too small.
    (r"vision/merger/fc[12]/(a|b|magnitude)", "any", P()),
    (r"text/embed/rows", "n D", P()),
    # Norm scales and the remaining biases are too small to be worth a collective.
    (r".*/(scale|bias)", "any", P()),
)


def spec_of(path: str) -> P:
    """The PartitionSpec of a parameter by its path, such as ``backbone/text/norm/scale``.

    Raises:
        KeyError: no line of the table speaks of it.
    """
    for pattern, _, spec in TABLE:
        if re.search(rf"(^|/){pattern}$", path):
            return spec
    raise KeyError(f"no sharding for parameter {path}: add it to the table in training/sharding.py")


def path_of(keys: tuple[Any, ...]) -> str:
    """A JAX key path as text: ``backbone/text/norm/scale``."""
    return "/".join(str(key.key) for key in keys)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a nested dict of parameters."""
    return jax.tree.map_with_path(lambda keys, _: NamedSharding(mesh, spec_of(path_of(keys))), params)


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer's state: moments lie where their parameters lie, the rest is replicated.

    A leaf belongs to the parameter whose path its own path ends in.
    """
    specs = {path_of(keys): spec_of(path_of(keys)) for keys, _ in jax.tree.leaves_with_path(params)}

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        return NamedSharding(mesh, specs.get("/".join(names), P()))

    return jax.tree.map_with_path(place, state)
