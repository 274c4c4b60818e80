"""What can be rebuilt of block B from the bridge token alone, and where attention goes.

The rows are those of stage 2 with every token of B hidden: B sees the bridge and itself, so that all it can know of
its words has come through the bridge. The control has the block A, and so the bridge, of another example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from cocoa_jax.attention.spans import Spans
from cocoa_jax.data.example import BLOCK_A, BLOCK_B, BRIDGE, Example
from cocoa_jax.data.packing import RowsConfig, plan_rows
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.rows import Arrays, VisibilityConfig, hide_tokens, place, write_rows
from cocoa_jax.data.sources import Record
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.qwen2_vl import Compute, Params, Qwen2VL, bind, graph_of
from cocoa_jax.models.text import TextModel

KINDS = (BLOCK_A, BRIDGE, BLOCK_B)
Look = Callable[[Params, Mapping[str, Any]], tuple[Array, Array, Array]]
_ROUND = 16  # hidden tokens of a row come in multiples of this


@dataclasses.dataclass(frozen=True, eq=False)
class Rebuilt:
    """Every hidden token of n examples.

    Args:
        example: whose token it is.
        first: whether it is the first of its block B, with a shift predicted from the bridge itself.
        bits: of surprise at the true token, log2.
        right: whether it was guessed.
        mass: [L, queries, keys] of ``KINDS``: where the attention of each kind goes, by layer; sums to 1 over keys.
    """

    example: Int[np.ndarray, " m"]
    first: np.ndarray
    bits: Float[np.ndarray, " m"]
    right: np.ndarray
    mass: Float[np.ndarray, "L 3 3"]


def partners(records: Sequence[Record], seed: int) -> list[int]:
    """For each record another one that shows something else, each taken once.

    Raises:
        ValueError: so many records show the same that this cannot be.
    """
    keys = [record.target_key for record in records]
    distinct = sorted(set(keys))
    rank = dict(zip(distinct, np.random.default_rng(seed).permutation(len(distinct)), strict=True))
    ranked = sorted(range(len(keys)), key=lambda i: rank[keys[i]])  # equal keys stand together, in random order
    most = max(keys.count(key) for key in set(keys))
    if 2 * most > len(keys):
        raise ValueError(f"{most} of {len(keys)} records show the same: take more of other things")
    chosen = [0] * len(keys)
    for place_, i in enumerate(ranked):
        chosen[i] = int(ranked[(place_ + most) % len(ranked)])
    return chosen


def rebuild(
    records: Sequence[Record],
    others: Sequence[int],
    processor: Processor,
    params: Params,
    rows: RowsConfig,
    visibility: VisibilityConfig,
    look: Look,
    shift: bool,
    tick: Callable[[int], object] = lambda count: None,
) -> Rebuilt:
    """Hides all of each record's words and predicts them.

    Args:
        others: the record whose block A each one gets; itself for the true bridge.
        rows: gives the shape; rows hold as many hidden tokens as fit.
        look: of `looker`.
        shift: whether a token is predicted from the state before it.
        tick: told how many more examples are done, for a bar of one's own.
    """
    room = rows.widest.tokens
    examples = {i: processor.bridge(records[others[i]].query, records[i].target, room) for i in range(len(records))}
    found: list[tuple[np.ndarray, ...]] = []
    masses = []
    for batch, owner, first in _batches(examples, processor, rows, visibility, shift):
        bits, right, mass = jax.device_get(look(params, batch))
        used = owner >= 0
        found.append((owner[used], first[used], bits[used], right[used]))
        masses.append(mass)
        tick(int(first.sum()))
    parts = [np.concatenate(part) for part in zip(*found, strict=True)]
    total = np.sum(masses, axis=0)
    mass = total / np.maximum(total.sum(axis=-1, keepdims=True), 1e-12)
    return Rebuilt(parts[0], parts[1], parts[2], parts[3], mass)


def _batches(
    examples: Mapping[int, Example],
    processor: Processor,
    config: RowsConfig,
    visibility: VisibilityConfig,
    shift: bool,
) -> Iterator[tuple[Arrays, np.ndarray, np.ndarray]]:
    """Rows of one shape, with the owner of each hidden token, -1 for none, and whether it is the first of its words."""
    shape, slots = config.widest, config.examples_per_row
    hidden = {i: np.flatnonzero(example.block == BLOCK_B).astype(np.int32) for i, example in examples.items()}
    lengths = np.array([(len(e.tokens), e.patches, len(hidden[i])) for i, e in examples.items()], np.int64)
    plan = plan_rows(lengths, (shape.tokens, shape.patches, shape.tokens), slots)
    most = max(int(lengths[row, 2].sum()) for row in plan)
    budget = -(-most // _ROUND) * _ROUND  # no more scores than needed, and few shapes
    for start in range(0, len(plan), shape.rows):
        part = plan[start : start + shape.rows]
        part += [[] for _ in range(shape.rows - len(part))]
        batch = write_rows(examples, part, processor, shape, slots, visibility, truncated=True)
        hide_tokens(batch, examples, part, hidden, budget, shift, processor.mask_id)
        batch["kind"] = np.zeros(batch["tokens"].shape, np.int32)
        for at in place(examples, part):
            block = examples[at.example].block
            batch["kind"][at.row, at.column : at.column + len(block)] = block
        owner, first = np.full((len(part), budget), -1), np.zeros((len(part), budget), bool)
        for row, members in enumerate(part):
            owners = [np.full(len(hidden[i]), i) for i in members]
            firsts = [np.arange(len(hidden[i])) == 0 for i in members]
            count = sum(map(len, owners))
            owner[row, :count] = np.concatenate([np.zeros(0, int), *owners])
            first[row, :count] = np.concatenate([np.zeros(0, bool), *firsts])
        yield batch, owner, first


def looker(config: Qwen2VLConfig, compute: Compute) -> Look:
    """(weights, batch) -> bits and hits of every hidden token, [B, M] each, and `attention_mass`; compiled once."""
    graph, _ = graph_of(config, compute)

    def look(params: Params, batch: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        model: Qwen2VL = bind(graph, params)
        inputs = Inputs.from_batch(batch)
        last, entered = model.states(inputs)
        hidden = model.text.norm(last)
        columns = jnp.maximum(batch["predict_at"], 0)[..., None]
        scores = model.logits(jnp.take_along_axis(hidden, columns, axis=1))
        true = jnp.maximum(batch["predict_id"], 0)
        surprise = jax.nn.logsumexp(scores, -1) - jnp.take_along_axis(scores, true[..., None], -1)[..., 0]
        right = jnp.argmax(scores, -1) == true
        return surprise / jnp.log(2.0), right, attention_mass(model.text, entered, inputs, batch["kind"])

    compiled: Look = jax.jit(look)
    return compiled


def attention_mass(
    text: TextModel, entered: Float[Array, "L B T D"], inputs: Inputs, kind: Int[Array, "B T"]
) -> Float[Array, "L 3 3"]:
    """The attention that queries of each of ``KINDS`` pay to keys of each, summed over queries, averaged over heads.

    Args:
        entered: what entered each layer.
        kind: of every column; others than ``KINDS`` are left out.
    """
    graph, params = nnx.split(text.layers)
    rotation = text.rotation(inputs.positions)
    of_kind = jnp.stack([kind == one for one in KINDS], axis=-1).astype(jnp.float32)

    def one(layer: tuple[Any, Array]) -> Array:
        state, x = layer
        made = nnx.merge(graph, state)
        weights = made.attention.weights(made.input_norm(x), rotation, Spans(inputs.spans.start, inputs.spans.end))
        return jnp.einsum("BTS,BTi,BSj->ij", weights.mean(axis=1), of_kind, of_kind)

    return jax.lax.map(one, (params, entered))
