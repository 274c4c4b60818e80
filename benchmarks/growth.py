"""Does a collective of the train step grow with the number of chips? ``python benchmarks/growth.py`` prints a table.

Each stage of ``configs/pods`` is compiled for larger and larger slices, with as many examples and rows a chip, and what
a chip sends is summed, once for arrays that speak of the examples of the whole batch (the embeddings of stage 3, their
gradients, their scores) and once for all others. The backbone is a small one, which changes what is sent and not what
grows. Static model: nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

from tqdm import tqdm

from cocoa_jax.config import TrainConfig, load_config
from cocoa_jax.models.config import Qwen2VLConfig, parse_config
from cocoa_jax.profiling.collectives import collectives
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.plan_search import changed
from cocoa_jax.profiling.steps import compile_step, step_mesh
from cocoa_jax.profiling.topology import tpu_slice
from cocoa_jax.training.mesh import AXES

REPOSITORY = Path(__file__).parents[1]
STAGES = ("1-warmup", "2-bridge", "3-contrastive")
SLICES = ("v5e:4x8", "v5e:8x8", "v5e:8x16")
# Of each chip; with these no length of an array of examples is padded, or is one of a parameter, padded or not, or of a
# row.
PAIRS, ROWS, SLOTS = 48, 2, 48
HOST = re.compile(r" (infeed|outfeed|send|recv)\(|MoveToHost|MoveToDevice|callback")


@dataclasses.dataclass(frozen=True)
class Sent:
    """What one chip sends in a step, KiB.

    Args:
        embeddings: arrays of all examples.
        others: everything else.
        steady: the others as in rings without end: a ring of n sends (n - 1) / n of that, which grows a little.
        kinds: ``steady`` by collective.
        host: operations that speak with the host.
    """

    stage: str
    training: str
    topology: str
    chips: int
    embeddings: float
    others: float
    steady: float
    kinds: dict[str, float]
    host: int


def small_backbone() -> Qwen2VLConfig:
    values = json.loads((REPOSITORY / "configs/backbones/qwen2-vl-2b/config.json").read_text())
    # A vocabulary as large beside the width as a real one: where it is small, XLA gathers the table to look tokens up.
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 32768}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    names = ("vision_start", "vision_end", "image", "video")
    tokens = {f"{name}_token_id": 2000 + at for at, name in enumerate(names)}
    values |= {**sizes, **heads, **tokens}
    values["vision_config"] |= {"depth": 2, "embed_dim": 160, "hidden_size": 512, "num_heads": 2}
    return parse_config(values)


def sent(stage: str, training: str, topology: str) -> Sent:
    """Compile a stage for a slice and add up what its chips send."""
    target = tpu_slice(topology)
    chips = len(target.devices)
    settings = {
        "data.rows.batch_size": PAIRS * chips,
        "data.rows.shapes": ((ROWS * chips, 256, 256),),
        "data.rows.examples_per_row": SLOTS,
        "data.rows.masked_per_row": 32,
    }
    if stage == "3-contrastive":
        settings["compute.chunk_rows"] = 1
    config = changed(load_config(TrainConfig, REPOSITORY / f"configs/pods/{stage}-{training}.yaml"), settings)
    mesh = step_mesh(config, target)
    text = compile_step(config, small_backbone(), mesh).as_text()
    module, all_examples = Module(text), _lengths(chips)
    shapes = {op.name: op.shape for ops in module.computations.values() for op in ops}
    sums, kinds = {"embeddings": 0.0, "others": 0.0, "steady": 0.0}, dict[str, float]()
    for one in collectives(module, dict(zip(AXES, mesh.devices.shape, strict=True))):
        share = _share(one.kind, shapes[one.name], all_examples)
        steady = (1 - share) * one.wire * one.group / max(one.group - 1, 1) / 2**10
        sums["embeddings"] += share * one.wire / 2**10
        sums["others"] += (1 - share) * one.wire / 2**10
        sums["steady"] += steady
        kinds[one.kind] = kinds.get(one.kind, 0.0) + steady
    return Sent(stage, training, topology, chips, **sums, kinds=kinds, host=len(HOST.findall(text)))


def _lengths(chips: int) -> set[int]:
    """Lengths of axes that only arrays of examples have: of all of them, and of one chip's part."""
    own = {PAIRS, 2 * PAIRS, ROWS * SLOTS}
    return own | {length * chips for length in own}


def _share(kind: str, shape: str, lengths: set[int]) -> float:
    """Which share of the bytes of a collective is of examples; several arrays may have been sent as one."""
    sizes, found = 0.0, 0.0
    for width, sides in re.findall(r"\b[a-z]+(\d*)\[([\d,]*)\]", shape):
        axes = [int(side) for side in sides.split(",") if side]
        size = int(width or 8) / 8 * math.prod(axes)
        sizes += size
        found += size * bool(lengths & set(axes))
    # A gather that begins shows its part and the whole, of different sizes.
    return float(found > 0) if kind == "all-gather" else found / max(sizes, 1.0)


def table(rows: list[Sent]) -> str:
    """As Markdown."""
    lines = [
        "| stage | trained | slice | chips | examples, KiB | all else, KiB | of it in endless rings, KiB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        sizes = f"{row.embeddings:,.0f} | {row.others:,.0f} | {row.steady:,.0f}"
        lines.append(f"| {row.stage} | {row.training} | {row.topology} | {row.chips} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--training", default="lora", choices=("lora", "full"))
    parser.add_argument("--slices", default=",".join(SLICES))
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of a table")
    given = parser.parse_args()
    cells = [(stage, topology) for stage in given.stages.split(",") for topology in given.slices.split(",")]
    rows = [sent(stage, given.training, topology) for stage, topology in tqdm(cells, unit="program")]
    sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in rows]) + "\n" if given.json else table(rows))


if __name__ == "__main__":
    main()
