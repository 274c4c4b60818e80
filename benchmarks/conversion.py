"""Both conversions beside `cp` of the same files: seconds, MB/s, and the most anonymous memory of each process.

    python benchmarks/conversion.py --folder runs/conversion [--rounds 2] [--config config.json]

Makes a checkpoint of random bfloat16 weights (the shape of Qwen2-VL-2B, 4.4 GB, where no config is given), converts it
there and back in processes of their own with a copy before and after, compares every byte and removes everything.
The folder needs room for three copies.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Sizes of Qwen2-VL-2B, from its public config.json.
CONFIG_2B: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


@dataclasses.dataclass(frozen=True)
class RandomLeaf:
    """Finite random bfloat16 values, made when numpy asks for them."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype = BFLOAT16

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rng = np.random.default_rng(list(self.path.encode()))
        bits = rng.integers(0, 2**16, self.shape, np.uint16)
        bits &= np.uint16(0xBFFF)  # the highest bit of the exponent off: no infinities, no NaN
        return bits.view(BFLOAT16)


def make(folder: Path, config: dict[str, Any]) -> int:
    """Write the random checkpoint, a leaf at a time; returns the bytes of its largest stacked leaf."""
    from flax.traverse_util import flatten_dict, unflatten_dict

    from cocoa_jax.checkpoints.huggingface import write_folder
    from cocoa_jax.models.config import parse_config
    from cocoa_jax.models.qwen2_vl import abstract_params

    side = folder.with_name("side")
    side.mkdir()
    (side / "config.json").write_text(json.dumps(config))
    leaves = flatten_dict(abstract_params(parse_config(config)), sep=".")
    random = {path: RandomLeaf(path, leaf.shape) for path, leaf in leaves.items()}
    write_folder(folder, unflatten_dict(random, sep="."), side)
    return max(2 * int(np.prod(leaf.shape)) for leaf in leaves.values())


def peak_of(work: Callable[[], None]) -> tuple[float, int]:
    """Seconds of some work, and the most anonymous memory (bytes) of this process during it, imports included."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return seconds, peak


def one(way: str, source: str, destination: str) -> None:
    """One conversion or copy in this process; prints [seconds, peak, processor seconds]."""
    from cocoa_jax.checkpoints.convert import hf_to_orbax, orbax_to_hf

    def copy() -> None:
        subprocess.run(["cp", "-r", source, destination], check=True)
        for path in Path(destination).rglob("*"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)  # both conversions end with everything on the disk
            os.close(handle)

    works: dict[str, Callable[[], None]] = {
        "cp": copy,
        "hf-to-orbax": lambda: hf_to_orbax(source, destination),
        "orbax-to-hf": lambda: orbax_to_hf(source, destination),
    }
    before = _cpu()
    seconds, peak = peak_of(works[way])
    sys.stdout.write(json.dumps([seconds, peak, _cpu() - before]) + "\n")


def _cpu() -> float:
    """Processor seconds of this process and those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def compare(folder: Path, config: dict[str, Any], rounds: int) -> bool:
    """All rounds; whether memory stayed below the limit and every byte came back."""
    hub, stage, back, copied = (folder / name for name in ("hub", "stage", "back", "copied"))
    largest = make(hub, config)
    limit = 2 * largest + 2**30
    size = sum(path.stat().st_size for path in hub.glob("*.safetensors"))
    sys.stdout.write(f"{size / 1e6:.0f} MB, largest stacked leaf {largest / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB\n")
    good = True
    plan = (("cp", hub, copied), ("hf-to-orbax", hub, stage), ("cp", hub, copied), ("orbax-to-hf", stage, back))
    for _ in range(rounds):
        for way, source, destination in plan:
            shutil.rmtree(destination, ignore_errors=True)
            command = [sys.executable, __file__, "--one", way, str(source), str(destination)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds, peak, cpu = json.loads(said.splitlines()[-1])
            line = f"{way:12} {seconds:7.1f} s {size / 1e6 / seconds:7.0f} MB/s  {cpu:6.1f} processor s"
            if way != "cp":
                line += f"  peak RssAnon {peak / 1e6:6.0f} MB ({peak / limit:.0%} of the limit)"
                good &= peak < limit
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            shutil.rmtree(copied, ignore_errors=True)
        names = sorted(path.name for path in hub.glob("*.safetensors*"))
        same = not any(filecmp.cmpfiles(hub, back, names, shallow=False)[1:])
        sys.stdout.write(f"{len(names)} files came back {'byte for byte' if same else 'CHANGED'}\n")
        good &= same
        shutil.rmtree(stage)
        shutil.rmtree(back)
    return good


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder to work in; must not exist, is removed at the end")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--config", help="config.json of another size")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(*arguments.one)
    config = json.loads(Path(arguments.config).read_text()) if arguments.config else CONFIG_2B
    folder = Path(arguments.folder)
    folder.mkdir(parents=True)
    try:
        good = compare(folder, config, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
