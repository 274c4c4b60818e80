"""LoRA and DoRA on a backbone: which maps are adapted, the adapter's parameters, and merging them into the weights.

An adapter is a tree of its own beside the frozen weights, nested as they are: ``a`` [L, I, r], ``b`` [L, r, O] and,
with DoRA, ``magnitude`` [L, O] in the place of each adapted map (no L where a map is not stacked), and ``rows`` [n, D]
in the place of the embedding. The layers find it in their own state, so that ``scan_layers`` scans it with the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.low_rank import LowRank, TrainedRows, column_norm, merged
from cocoa_jax.models.qwen2_vl import Compute, Params, Qwen2VL, abstract_params

# Of the paper: every map of a text layer; of a vision layer the joint map of attention and the MLP of either family.
TARGETS = (
    r"text\.layers\.attention\.[qkvo]_proj",
    r"text\.layers\.mlp\.(gate|up|down)_proj",
    r"vision\.layers\.attention\.qkv",
    r"vision\.layers\.mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)",
)
_NEVER = r"text\.head|vision\.patch_embed"  # the head is no called map, and PEFT's update of a convolution is another
_EMBED = "text.embed"


class LoraError(ValueError):
    """Settings of an adapter that contradict themselves or the backbone; the message lists every problem."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is trained instead of the backbone's own weights.

    Args:
        targets: regular expressions, each of which must fit the whole path of one linear map at least, such as
            ``text.layers.attention.q_proj``.
        rank: inner width r of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: share of the inputs of every update that is dropped in training.
        dora: whether lengths of columns are trained apart from their directions.
        dora_dropout: with DoRA, what sees the dropped inputs: ``peft``, all that training adds, or ``update``, the
            low-rank product alone (ours), which spares a second product with the weight.
        tokens: whether the embedding's rows of the mask and bridge tokens are trained too.
        base_dtype: how the frozen weights are held; the adapter is always float32.
    """

    targets: tuple[str, ...] = TARGETS
    rank: int = 8
    alpha: float = 64.0
    dropout: float = 0.1
    dora: bool = True
    dora_dropout: Literal["peft", "update"] = "peft"
    tokens: bool = True
    base_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        problems = [f"targets has {bad!r}, no regular expression" for bad in self.targets if not _compiles(bad)]
        if not self.targets and not self.tokens:
            problems.append("targets is empty and tokens is off: nothing is left to train")
        if self.rank < 1:
            problems.append(f"rank is {self.rank}: at least 1")
        if not self.alpha > 0:
            problems.append(f"alpha is {self.alpha}: it must be positive")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}: at least 0 and below 1")
        _raise(problems)

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.alpha / self.rank


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _raise(problems: list[str]) -> None:
    if problems:
        raise LoraError("lora: " + "; ".join(problems))


# ------------------------------------------------------------------------------------------ the adapter and its model


def adapted_maps(params: Params, config: LoraConfig) -> dict[str, Any]:
    """The kernels [(L,) I, O] of the maps that ``config`` adapts, by the dotted path of the map.

    Raises:
        LoraError: naming every target that fits no map, or one that cannot be adapted.
    """
    kernels = flatten_dict(params, sep=".")
    maps = {path.removesuffix(".kernel"): leaf for path, leaf in kernels.items() if path.endswith(".kernel")}
    reached = {target: [path for path in maps if re.fullmatch(target, path)] for target in config.targets}
    problems = [
        f"target {target!r} fits no map: choose of {', '.join(maps)}" for target in reached if not reached[target]
    ]
    wanted = {path for paths in reached.values() for path in paths}
    problems += [f"{path} cannot be adapted: leave it out" for path in sorted(wanted) if re.fullmatch(_NEVER, path)]
    _raise(problems)
    return {path: leaf for path, leaf in maps.items() if path in wanted}


def adapted_graph(
    sizes: Qwen2VLConfig, compute: Compute, config: LoraConfig, rows: tuple[int, ...], *, dropout: bool = False
) -> tuple[nnx.GraphDef, Params]:
    """The structure of an adapted backbone, and the shapes of its adapter.

    Args:
        rows: ids of the tokens whose rows are trained, ascending; empty for none.
        dropout: whether the structure takes dropout keys.

    Raises:
        LoraError: a target that fits nothing, or a row outside the embedding.
    """
    maps = adapted_maps(abstract_params(sizes), config)
    vocabulary = sizes.text.vocab_size
    _raise([f"row {row} is outside of the embedding of {vocabulary} rows" for row in rows if not 0 <= row < vocabulary])

    def build() -> Qwen2VL:
        model = Qwen2VL(sizes, compute, rngs=nnx.Rngs(0))
        for path, kernel in maps.items():
            *stack, inputs, outputs = kernel.shape
            place: Any = functools.reduce(getattr, path.split("."), model)
            place.adapter = LowRank(
                tuple(stack),
                inputs,
                outputs,
                rank=config.rank,
                scale=config.scale,
                dora=config.dora,
                rate=config.dropout if dropout else 0.0,
                weight_too=config.dora_dropout == "peft",
            )
        if rows:
            model.text.embed.adapter = TrainedRows(rows, sizes.text.width)
        return model

    graph, state = nnx.split(nnx.eval_shape(build))
    leaves = flatten_dict(nnx.to_pure_dict(state))
    shapes = {(*keys[:-2], keys[-1]): leaf for keys, leaf in leaves.items() if _is_trained(keys)}
    return graph, unflatten_dict(shapes)


def _is_trained(keys: tuple[str, ...]) -> bool:
    return keys[-2] == "adapter" and keys[-1] not in ("words", "norm")


def column_norms(base: Params, adapter: Params, scale: float) -> Params:
    """With DoRA, the lengths [(L,) O] of the columns of every adapted map, which are constants to the gradient.

    They cost a pass over all frozen weights, whatever the batch: a step makes them once, outside of chunks and layers.
    """
    kernels, parts = flatten_dict(base), flatten_dict(adapter)

    def of(place: tuple[str, ...]) -> Array:
        return column_norm(kernels[(*place, "kernel")], parts[(*place, "a")], parts[(*place, "b")], scale)

    places = [path[:-1] for path in parts if path[-1] == "magnitude"]
    return jax.lax.stop_gradient(unflatten_dict({place: of(place) for place in places}))


def join(
    base: Params,
    adapter: Params,
    norms: Params,
    key: Array | None = None,
    chunk: tuple[Array | int, Array | int] = (0, 1),
) -> Params:
    """What ``bind`` takes for the structure of ``adapted_graph``: frozen weights, adapter and, in training, dropout.

    Args:
        norms: of ``column_norms``.
        key: of this step; every map and every layer of it gets words of its own. None where nothing is dropped.
        chunk: its number and how many there are, where the model sees but a chunk of the batch.
    """
    cut = jnp.stack([jnp.uint32(number) for number in chunk])
    leaves = flatten_dict(base)
    for place, leaf in flatten_dict(norms).items():
        leaves[(*place, "adapter", "norm")] = leaf
    for (*place, name), leaf in flatten_dict(adapter).items():
        leaves[(*place, "adapter", name)] = leaf
        if name == "a" and key is not None:
            own = jax.random.fold_in(key, zlib.crc32(".".join(place).encode()))
            words = jax.random.bits(own, (*leaf.shape[:-2], 2), jnp.uint32)
            leaves[(*place, "adapter", "words")] = jnp.concatenate([words, jnp.broadcast_to(cut, words.shape)], -1)
    return unflatten_dict(leaves)


def init_adapter(base: Params, config: LoraConfig, rows: tuple[int, ...], seed: int) -> Params:
    """An adapter that changes nothing yet, float32: Gaussian ``a`` of deviation 1/rank, zero ``b``, the norms and rows
    of the weights themselves. Each map's ``a`` depends on the seed and its own path only."""
    made: dict[str, Any] = {}
    for path, kernel in adapted_maps(base, config).items():
        *stack, inputs, outputs = kernel.shape
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        a = jax.random.normal(key, (*stack, inputs, config.rank)) / config.rank
        b = jnp.zeros((*stack, config.rank, outputs))
        made[path] = {"a": a, "b": b}
        if config.dora:
            made[path]["magnitude"] = column_norm(kernel, a, b, config.scale)
    if rows:
        made[_EMBED] = {"rows": base["text"]["embed"]["table"][jnp.array(rows)].astype(jnp.float32)}
    return unflatten_dict(made, sep=".")


# ------------------------------------------------------------------------------------------------------------ merging


def merge(base: Params, adapter: Params, config: LoraConfig, rows: tuple[int, ...], *, donate: bool = False) -> Params:
    """The weights that give without an adapter what ``base`` gives with it, in the types and places of ``base``.

    Args:
        donate: whether the adapted leaves of ``base`` are used up, so that one of them at a time exists twice.
    """
    leaves = flatten_dict(base, sep=".")
    for path, part in adapted_leaves(adapter).items():
        leaves[path] = merge_leaf(leaves[path], part, config, rows, donate=donate)
    return unflatten_dict(leaves, sep=".")


def adapted_leaves(adapter: Params) -> dict[str, dict[str, Any]]:
    """The arrays of an adapter by the dotted path of the leaf that they change."""
    parts: dict[str, dict[str, Any]] = {}
    for (*place, name), leaf in flatten_dict(adapter).items():
        path = ".".join(place)
        parts.setdefault(f"{path}.{'table' if path == _EMBED else 'kernel'}", {})[name] = leaf
    return parts


def merge_leaf(
    leaf: Any, part: Mapping[str, Any], config: LoraConfig, rows: tuple[int, ...], *, donate: bool = False
) -> Array:
    """``merge`` of one leaf with its part of the adapter, as ``adapted_leaves`` gives it."""
    leaf = jnp.asarray(leaf)
    write = _merge_rows(rows) if "rows" in part else _merge_map(config.scale)
    run = jax.jit(write, donate_argnums=(0,) if donate else (), out_shardings=leaf.sharding)
    return run(leaf, jax.device_get(part))  # small; the weights say which devices work


@functools.cache  # the same function for the same numbers, so that a shape is compiled once
def _merge_rows(rows: tuple[int, ...]) -> Any:
    return lambda table, part: table.at[jnp.array(rows)].set(part["rows"].astype(table.dtype))


@functools.cache
def _merge_map(scale: float) -> Any:
    def one(parts: tuple[Array, Array, Array, Array | None]) -> Array:
        return merged(*parts, scale)

    def run(kernel: Array, part: Mapping[str, Array]) -> Array:
        parts = (kernel, part["a"], part["b"], part.get("magnitude"))
        return one(parts) if kernel.ndim == 2 else jax.lax.map(one, parts)  # an update of one layer at a time

    return run


# ------------------------------------------------------------------------------------------------- what a stage notes


@dataclasses.dataclass(frozen=True)
class AdapterRecord:
    """What has to be known of an adapter beside its arrays: its settings and the ids of its trained rows."""

    config: LoraConfig
    rows: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in a stage's metadata."""
        return {
            "config": {**dataclasses.asdict(self.config), "targets": list(self.config.targets)},
            "rows": list(self.rows),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterRecord:
        """The inverse of ``to_json``."""
        config = values["config"]
        return cls(LoraConfig(**{**config, "targets": tuple(config["targets"])}), tuple(values["rows"]))
