"""How far this backbone is from transformers, as the tables of docs/parity.md.

    python benchmarks/parity.py [--size tiny|middle] [--write docs/parity.md]

Random weights and random rows of text, pictures and videos, both families, all masks. With ``--write`` the tables
replace what stands between the markers of that size in the file.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

import hugging_face
import numpy as np
import our_side
import torch
from layouts import MASKS, Document, Layout, lay_out
from sizes import FAMILIES, config_values, make_config, parameters, random_params

from cocoa_jax.data.vision_plan import VisionRun
from cocoa_jax.models.config import Qwen2VLConfig

SEED = 1
ROWS: list[Document] = [
    [3, VisionRun((1, 8, 12)), 5, VisionRun((1, 6, 10)), 17],
    [VisionRun((3, 8, 6), 1.5), 4, VisionRun((1, 4, 4)), 9],
    [30],
    [2, VisionRun((2, 10, 4), 0.7), 11],
]
TOKENS, PATCHES = 96, 192

Measure = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], dict[str, float]]


def kind_of(name: str, config: Qwen2VLConfig) -> str:
    """What a state comes out of: the state that enters layer i comes out of layer i - 1."""
    vision = config.vision
    if name == "vision0":
        return "patch embedding"
    if name.startswith("vision"):
        layer = (int(name.removeprefix("vision")) if name != "vision" else vision.layers) - 1
        return "vision layer, window" if vision.window and layer not in vision.full_layers else "vision layer, full"
    names = {"merged": "merger", "hidden0": "token embedding with units", "hidden": "last layer and final norm"}
    return names.get(name, "logits" if name == "logits" else "text layer")


def by_kind(errors: dict[str, float], config: Qwen2VLConfig) -> dict[str, float]:
    """The worst of each kind."""
    worst: dict[str, float] = {}
    for name, error in errors.items():
        kind = kind_of(name, config)
        worst[kind] = max(error, worst.get(kind, 0.0))
    return worst


def table(head: list[str], columns: list[dict[str, str]]) -> str:
    """A Markdown table of named cells, one column of cells a dict; a dash where a column lacks the name."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = ["| " + " | ".join(["", *head]) + " |", "|---" * (len(head) + 1) + "|"]
    lines += ["| " + " | ".join([name, *(column.get(name, "-") for column in columns)]) + " |" for name in names]
    return "\n".join(lines)


def exact(size: str) -> str:
    """The float32 table: every state, the loss and the gradients."""
    head, columns = [], []
    for family in FAMILIES:
        config, params = make_config(family, size), random_params(make_config(family, size), SEED)
        model = hugging_face.make_model(config_values(family, size), SEED, attention="eager")
        for mask in MASKS:
            layout = lay_out(config, ROWS, TOKENS, PATCHES, side="left", seed=2)
            want = our_side.their_parts(layout, hugging_face.states(model, layout, mask))
            got = our_side.real_parts(layout, our_side.forward(config)(params, layout.ours(mask)))
            column = {k: f"{e:.1e}" for k, e in by_kind(our_side.largest(got, want), config).items()}
            if mask == "truncated":
                column |= losses(model, params, layout)
            head.append(f"{family}, {mask}")
            columns.append(column)
        our_side.forward.cache_clear()
    return table(head, columns)


def losses(model: torch.nn.Module, params: our_side.Params, layout: Layout) -> dict[str, str]:
    """The loss of some predictions, and the gradient norm that is furthest off."""
    rng = np.random.default_rng(SEED)
    at = np.stack([rng.permutation(np.flatnonzero(real))[:8] for real in layout.real]).astype(np.int32)
    ids = rng.integers(0, 100, at.shape).astype(np.int32)
    loss, norms = our_side.loss_and_gradients(params, layout, "truncated", at, ids)
    want, wanted = hugging_face.loss_and_gradients(model, layout, "truncated", at, ids)
    assert norms.keys() == wanted.keys()
    furthest = max(abs(norms[key] / wanted[key] - 1) for key in norms)
    return {"loss, absolute": f"{abs(loss - want):.1e}", f"gradient norm, worst of {len(norms)}": f"{furthest:.1e}"}


def bfloat16(size: str) -> str:
    """Deviations of bfloat16 from float32 transformers, ours and theirs, means over the masks."""
    head, columns = [], []
    for family in FAMILIES:
        values, config = config_values(family, size), make_config(family, size)
        layout = lay_out(config, ROWS, TOKENS, PATCHES, side="left", seed=2)
        model = hugging_face.make_model(values, SEED, attention="eager")
        wanted = {mask: our_side.their_parts(layout, hugging_face.states(model, layout, mask)) for mask in MASKS}
        sides: dict[str, list[dict[str, float]]] = {"ours": [], "SDPA": [], "eager": []}
        params = random_params(config, SEED)
        for mask, want in wanted.items():
            states = our_side.forward(config, "bfloat16")(params, layout.ours(mask))
            sides["ours"].append(our_side.root_mean_square(our_side.real_parts(layout, states), want))
        for attention in ("sdpa", "eager"):
            model = hugging_face.make_model(values, SEED, dtype=torch.bfloat16, attention=attention)
            for mask, want in wanted.items():
                states = our_side.their_parts(layout, hugging_face.states(model, layout, mask))
                name = "SDPA" if attention == "sdpa" else attention
                sides[name].append(our_side.root_mean_square(states, want))
        for name, found in sides.items():
            means = {state: float(np.mean([errors[state] for errors in found])) for state in found[0]}
            head.append(f"{family}, {name}")
            columns.append({kind: f"{error:.2e}" for kind, error in by_kind(means, config).items()})
        our_side.forward.cache_clear()
    return table(head, columns)


def report(size: str) -> str:
    """Both tables of a size."""
    millions = {family: parameters(make_config(family, size)) / 1e6 for family in FAMILIES}
    counts = " and ".join(f"{count:.1f}M parameters (family {family})" for family, count in millions.items())
    config = make_config("2", size)
    widths = f"heads {config.text.head_width} wide in text, {config.vision.width // config.vision.heads} in vision"
    return "\n\n".join(
        [
            f"Size `{size}`: {counts}, {widths}.",
            "float32: largest difference of a state over the largest number of that state (worst layer of a kind).",
            exact(size),
            "bfloat16: root mean square of what each side strays from float32 transformers, over that of the state "
            "(worst layer of a kind, mean over the three masks).",
            bfloat16(size),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=("tiny", "middle"))
    parser.add_argument("--write", type=Path, help="a Markdown file with a pair of markers for the size")
    options = parser.parse_args()
    text = report(options.size)
    print(text)
    if options.write:
        begin, end = f"<!-- {options.size}: begin -->", f"<!-- {options.size}: end -->"
        page = options.write.read_text()
        whole = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
        if not whole.search(page):
            parser.error(f"{options.write} lacks the markers {begin} and {end}: add them")
        options.write.write_text(whole.sub(lambda _: f"{begin}\n{text}\n{end}", page))


if __name__ == "__main__":
    main()
