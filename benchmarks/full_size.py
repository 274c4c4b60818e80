"""Qwen2-VL 2B at full size: one picture of 448 x 448 and 64 text tokens, ours and transformers one after the other.

    python benchmarks/full_size.py [--family 2] [--folder DIR]

Random weights, drawn from one seed on both sides. Each run is a process of its own, leaves its last hidden state in the
folder and prints its peak memory; at the end the states are compared. About 10 GiB for the float32 runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from layouts import Layout, lay_out
from peak import peak_gib
from sizes import config_values, make_config, parameters, random_params

from cocoa_jax.data.vision_plan import VisionRun

SEED = 0
MASK = "bidirectional"
RUNS = ("torch-float32", "ours-float32", "torch-bfloat16", "ours-bfloat16")


def make_layout(family: str) -> Layout:
    """A picture of 32 x 32 patches and 64 text tokens, padded to 384 tokens on the left."""
    config = make_config(family, "full")
    return lay_out(config, [[VisionRun((1, 32, 32)), 64]], 384, 1024, side="left", seed=SEED)


def last_hidden(run: str, family: str) -> np.ndarray:
    """The last hidden state of one run at the slots that hold a token, float32."""
    layout, (side, dtype) = make_layout(family), run.split("-")
    if side == "torch":
        import torch
        from hugging_face import arguments, make_model

        torch.set_num_threads(2)
        values = config_values(family, "full")
        model = make_model(values, SEED, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
        with torch.no_grad():
            out = model.model(**arguments(model, layout, MASK), use_cache=False)
        return out.last_hidden_state.float().numpy()[layout.real]

    import jax

    from cocoa_jax.models.inputs import Inputs
    from cocoa_jax.models.qwen2_vl import Compute, bind, graph_of

    graph, _ = graph_of(layout.config, Compute(dtype=dtype))
    leaves = flatten_dict(random_params(layout.config, SEED, jax.numpy.dtype(dtype)))
    for path in list(leaves):  # one by one, so that only one leaf is held twice
        leaves[path] = jax.device_put(leaves.pop(path)).block_until_ready()
    run_model = jax.jit(lambda params, batch: bind(graph, params)(Inputs.from_batch(batch)))
    state = run_model(unflatten_dict(leaves), layout.ours(MASK))
    return np.asarray(state.astype("float32"))[layout.real]


def compare(folder: Path) -> None:
    states = {run: np.load(folder / f"{run}.npy") for run in RUNS}
    exact = states["torch-float32"]
    difference = np.abs(states["ours-float32"] - exact).max() / np.abs(exact).max()
    print(f"last hidden state, float32: largest difference {difference:.1e} of the largest number")
    for run in RUNS[2:]:
        stray = states[run] - exact
        largest, mean = np.abs(stray).max() / np.abs(exact).max(), np.linalg.norm(stray) / np.linalg.norm(exact)
        print(f"{run} from float32: root mean square {mean:.2e}, largest {largest:.2e} (relative)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="2", choices=("2", "2.5"))
    parser.add_argument("--folder", type=Path, help="where the states are kept; a temporary folder without it")
    parser.add_argument("--run", choices=RUNS, help="one run alone")
    parser.add_argument("--compare", action="store_true", help="compare the states of earlier runs in the folder")
    options = parser.parse_args()
    if options.run:
        began = time.perf_counter()
        np.save(options.folder / f"{options.run}.npy", last_hidden(options.run, options.family))
        print(f"{options.run}: {time.perf_counter() - began:.0f} s with drawing the weights, peak {peak_gib():.2f} GiB")
        return
    if options.compare:
        compare(options.folder)
        return
    print(f"{parameters(make_config(options.family, 'full')) / 1e9:.2f} billion parameters")
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        for run in RUNS:
            command = [sys.executable, __file__, "--family", options.family, "--folder", str(folder), "--run", run]
            subprocess.run(command, check=True)
        compare(folder)


if __name__ == "__main__":
    main()
