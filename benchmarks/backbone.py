"""A forward pass and a train step (forward and backward) beside transformers with torch SDPA: same weights, same rows.

    python benchmarks/backbone.py [--rows 8] [--tokens 512] [--rounds 3] [--logits chosen|all|own]

Text rows under the truncated mask, float32, the 100M configuration of ``sizes.py``. Both sides run in turns in one
process on the same two cores, and the ratio of the medians is printed, of seconds and of processor seconds, which a
busy machine stretches less; peak memory is that of one train step in a process for each side.

``--logits`` says which slots meet the LM head: those where something is predicted (``chosen``), all of them (``all``),
or on each side what it does by itself (``own``): our objectives the chosen ones, the model of transformers all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not count as work, nor steal from the other

import numpy as np
from layouts import Layout, lay_out
from peak import peak_gib
from sizes import config_values, make_config, parameters, random_params

MASKED = 0.7  # of block B, the ratio of stage 2
SEED = 0
MASK = "truncated"


def make_layout(options: argparse.Namespace) -> tuple[Layout, np.ndarray, np.ndarray]:
    """Rows of text whose second half is block B, and what is predicted where."""
    config = make_config(options.family, "middle")
    half = options.tokens // 2
    documents = [[options.tokens - half, half]] * options.rows
    layout = lay_out(config, documents, options.tokens, 0, side="right", seed=SEED)
    rng = np.random.default_rng(SEED)
    count = int(MASKED * (half - 1))
    at = np.stack([np.sort(rng.permutation(half - 1)[:count]) + options.tokens - half for _ in documents])
    ids = np.take_along_axis(layout.batch["tokens"], at + 1, axis=1)
    return layout, at.astype(np.int32), ids


def our_side(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """The jitted passes of this project; each call gives the loss."""
    import jax

    from cocoa_jax.models.inputs import Inputs
    from cocoa_jax.models.qwen2_vl import Compute, bind, graph_of
    from cocoa_jax.objectives.masked_text import masked_text_loss

    layout, at, ids = make_layout(options)
    graph, _ = graph_of(layout.config, Compute(remat=options.remat))
    params = jax.tree.map(jax.numpy.asarray, random_params(layout.config, SEED))
    batch = jax.tree.map(jax.numpy.asarray, layout.ours(MASK))

    def loss(params: Any, batch: Any) -> Any:
        model = bind(graph, params)
        hidden = model(Inputs.from_batch(batch))
        if options.logits != "all":
            return masked_text_loss(model, hidden, at, ids)[0]
        scores = jax.nn.log_softmax(model.logits(hidden))
        return -scores[np.arange(len(at))[:, None], at, ids].mean()

    forward, step = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    return {
        "forward": lambda: float(forward(params, batch)),
        "train step": lambda: float(jax.block_until_ready(step(params, batch))[0]),
    }


def torch_side(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """The same of transformers with SDPA."""
    import torch
    from hugging_face import additive, make_model

    torch.set_num_threads(2)
    layout, at, ids = make_layout(options)
    model = make_model(config_values(options.family, "middle"), SEED, attention="sdpa")
    given = {
        "input_ids": torch.from_numpy(layout.theirs["input_ids"]),
        "position_ids": torch.from_numpy(layout.batch["positions"]).permute(2, 0, 1).long(),
        "attention_mask": additive(layout, MASK, torch.float32),
    }
    rows, columns, true = torch.arange(len(at))[:, None], torch.from_numpy(at).long(), torch.from_numpy(ids).long()

    def loss() -> torch.Tensor:
        if options.logits == "chosen":
            hidden = model.model(**given, use_cache=False).last_hidden_state
            chosen = model.lm_head(hidden[rows, columns])
        else:
            chosen = model(**given, use_cache=False).logits[rows, columns]
        return torch.nn.functional.cross_entropy(chosen.flatten(0, 1), true.flatten())

    def forward() -> float:
        with torch.no_grad():
            return float(loss())

    def step() -> float:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return float(value.detach())

    return {"forward": forward, "train step": step}


SIDES = {"ours": our_side, "torch": torch_side}


def compare(options: argparse.Namespace) -> None:
    """Run both sides in turns and print the ratios of their medians."""
    sides = {name: make(options) for name, make in SIDES.items()}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    values: dict[tuple[str, str], float] = {}
    for round_ in range(options.rounds + 1):
        for work in ("forward", "train step"):
            for name, side in sides.items():
                began, worked = time.perf_counter(), time.process_time()
                values[name, work] = side[work]()
                took = time.perf_counter() - began, time.process_time() - worked
                print(f"  round {round_}, {work}, {name}: {took[0]:.2f} s, {took[1]:.2f} processor s", file=sys.stderr)
                if round_:  # the first compiles and warms up
                    times.setdefault((name, work), []).append(took)
    for work in ("forward", "train step"):
        for place, unit in enumerate(("s", "processor s")):
            found = {name: [took[place] for took in times[name, work]] for name in SIDES}
            ours, theirs = (float(np.median(found[name])) for name in ("ours", "torch"))
            spread = ", ".join(f"{name} {min(found[name]):.2f} to {max(found[name]):.2f}" for name in SIDES)
            print(f"{work}: ours {ours:.2f} {unit}, torch {theirs:.2f}, torch / ours {theirs / ours:.2f} ({spread})")
        print(f"  losses {values['ours', work]:.6f} and {values['torch', work]:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="2", choices=("2", "2.5"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--logits", default="chosen", choices=("chosen", "all", "own"), help="slots that meet the LM head"
    )
    parser.add_argument("--remat", default="products", choices=("none", "products", "full"))
    parser.add_argument("--memory", choices=tuple(SIDES), help="one train step of one side, its peak memory")
    options = parser.parse_args()
    if options.memory:
        SIDES[options.memory](options)["train step"]()
        print(f"{options.memory}: peak {peak_gib():.2f} GiB")
        return
    config = make_config(options.family, "middle")
    size = f"{parameters(config) / 1e6:.0f}M parameters, {options.rows} x {options.tokens} tokens"
    print(f"{size}, {options.logits} logits, remat {options.remat}")
    compare(options)
    for name in SIDES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory", name], check=True)


if __name__ == "__main__":
    main()
