"""One train step of each stage beside the same step in PyTorch (transformers, SDPA, the mask given): time and memory.

    python benchmarks/train_step.py [--stages warmup,bridge,contrastive] [--rows 16] [--rounds 3]

The 100M configuration of ``sizes.py``, float32, all of it trained: forward, backward, clipping and AdamW. Every side is
a process of its own, so that its peak memory is its own; they take turns, step by step, on the same two cores, and the
ratios of the medians are printed. ``whole`` is our step with all rows at a time, ``small`` with two, ``kept`` that of
stage 3 with two, of which it keeps what ``small`` computes again. In stage 3 a query with its picture and its target
without one share a row of ours, as packed data lie; transformers takes an example a row, and in its tower only pictures
that are there. Losses of all sides are compared, so that they do the same work.
"""

from __future__ import annotations

import argparse
import json
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

from cocoa_jax.data.vision_plan import VisionRun

STAGES = ("warmup", "bridge", "contrastive")
SIDES = {
    "whole": {"remat": "products"},
    "kept": {"remat": "products", "chunk_rows": 2, "chunk_remat": False},
    "small": {"remat": "products", "chunk_rows": 2},
    "torch": {},
}
GRID, TOKENS, PATCHES = (1, 32, 32), 352, 1024  # a picture of 448 x 448: 256 visual tokens
RATE, TEMPERATURE, MAE_WEIGHT, SEED = 1e-5, 0.02, 0.5, 0
MASKS = {"warmup": "bidirectional", "bridge": "truncated", "contrastive": "bidirectional"}


def make_batch(stage: str, rows: int) -> tuple[Layout, dict[str, np.ndarray]]:
    """Rows of one example each, and what the stage asks of them."""
    config, rng, picture = make_config("2", "middle"), np.random.default_rng(SEED), VisionRun(GRID)
    document: list[Any] = [picture, 30, 64] if stage == "bridge" else [picture, 94]
    documents = [document] * rows
    if stage == "contrastive":
        documents = [[picture, 40]] * (rows // 2) + [[TOKENS]] * (rows // 2)
    layout = lay_out(config, documents, TOKENS, PATCHES, side="right", seed=SEED)
    batch = layout.ours(MASKS[stage])
    ends = layout.real.sum(axis=1).astype(np.int32) - 1
    batch |= {"pool": ends[:, None, None], "example": np.arange(rows, dtype=np.int32)}
    if stage == "contrastive":
        keys = np.arange(rows // 2, dtype=np.int32)
        return layout, batch | {"target_key": keys, "image_key": np.full_like(keys, -1)}
    count, text = (45, 64) if stage == "bridge" else (19, 94)  # 0.7 and 0.2 of the text
    at = np.stack([end - 1 - np.sort(rng.permutation(text - 1)[:count]) for end in ends]).astype(np.int32)
    batch |= {"predict_at": at, "predict_id": np.take_along_axis(batch["tokens"], at + 1, axis=1)}
    if stage == "warmup":
        units = PATCHES // config.vision.unit_patches
        batch["hidden_unit"] = rng.random((rows, units)) < 0.5
        batch["unit_seed"] = rng.integers(0, 2**32, (rows, units), np.uint32)
    return layout, batch


def pairs_in_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch of stage 3 with each target behind its query, in the patches of the query's row."""
    half, columns = len(batch["tokens"]) // 2, batch["tokens"].shape[1]
    assert not batch["patch_end"][half:].any(), "targets show pictures"
    moved = {"token_start", "token_end", "pool"}
    found = {
        name: np.concatenate([x[:half], x[half:] + columns * (name in moved)], axis=1)
        for name, x in batch.items()
        if name in moved or name in ("tokens", "positions", "unit")
    }
    pictures = {name: x[:half] for name, x in batch.items() if name.startswith("patch")}
    keys = {name: batch[name] for name in ("target_key", "image_key")}
    return found | pictures | keys | {"example": np.arange(2 * half, dtype=np.int32).reshape(half, 2).T.reshape(-1)}


def our_side(stage: str, rows: int, compute: dict[str, Any]) -> Callable[[], float]:
    """The trainer's own step; each call updates the weights and gives the loss."""
    from cocoa_jax.config import MeshConfig, TrainConfig, parse
    from cocoa_jax.training.mesh import make_mesh
    from cocoa_jax.training.optimizer import make_optimizer
    from cocoa_jax.training.place import place
    from cocoa_jax.training.stages import stage_program
    from cocoa_jax.training.state import abstract_state, first_state
    from cocoa_jax.training.step import make_step

    layout, batch = make_batch(stage, rows)
    if stage == "contrastive":
        batch = pairs_in_rows(batch)
    shape, slots = [*batch["tokens"].shape, PATCHES], batch["pool"].shape[1]
    data: dict[str, Any] = {
        "kinds": {"any": 1.0},
        "processor": {"min_pixels": 784, "max_pixels": 448**2, "max_text_tokens": 64},
        "rows": {"batch_size": rows, "shapes": [shape], "examples_per_row": slots, "masked_per_row": 64},
    }
    if stage != "contrastive":
        data["masking"] = {"text_ratio": 0.5, "image_ratio": 0.5 if stage == "warmup" else 0.0}
    values = {"stage": stage, "checkpoint": "any", "output": "any", "seed": SEED, "data": data, "loop": {"steps": 1000}}
    values |= {"optimizer": {"learning_rate": RATE, "schedule": "constant", "warmup_steps": 0}, "compute": compute}
    config = parse(TrainConfig, values | {"contrastive": {"temperature": TEMPERATURE}})
    mesh, optimizer = make_mesh(MeshConfig()), make_optimizer(config.optimizer, config.loop.steps)
    program = stage_program(config, layout.config)
    wanted = abstract_state(program.shapes, optimizer, mesh)
    state = first_state(program.first_params(random_params(layout.config, SEED)), optimizer, wanted)
    step, placed = make_step(program.loss, optimizer, wanted, config.loop.steps), place(batch, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, placed)
        return float(metrics["loss"])

    return run


def torch_side(stage: str, rows: int, compute: dict[str, Any]) -> Callable[[], float]:
    """The same in PyTorch."""
    del compute
    import copy

    import torch
    from hugging_face import additive, make_model

    torch.set_num_threads(2)
    layout, batch = make_batch(stage, rows)
    model = make_model(config_values("2", "middle"), SEED, attention="sdpa").train()
    mask, places = additive(layout, MASKS[stage], torch.float32), torch.from_numpy(batch["positions"])
    given = {name: torch.from_numpy(layout.theirs[name]) for name in ("input_ids", "pixel_values", "image_grid_thw")}
    given |= {"position_ids": places.permute(2, 0, 1).long(), "attention_mask": mask}
    trained, language = [*model.parameters()], model.model.language_model
    if stage == "warmup":
        shown, true, proj, columns = _pictures(layout, batch)
        given["pixel_values"] = torch.from_numpy(shown)
        layer = copy.deepcopy(language.layers[layout.config.text.layers // 2])
        drawn_by = torch.nn.Linear(*proj.shape)
        with torch.no_grad():
            drawn_by.weight.copy_(torch.from_numpy(proj.T))
            drawn_by.bias.zero_()
        trained += [*layer.parameters(), *drawn_by.parameters()]
        target, at = torch.from_numpy(true), tuple(torch.from_numpy(x) for x in columns)
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=1e-8, weight_decay=0.0)

    def chosen_text(hidden: Any) -> Any:
        columns, ids = (torch.from_numpy(batch[name]).long() for name in ("predict_at", "predict_id"))
        scores = model.lm_head(hidden[torch.arange(rows)[:, None], columns])
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids.flatten())

    def loss_of(hidden: Any) -> Any:
        if stage == "contrastive":
            pooled = hidden[torch.arange(rows), torch.from_numpy(batch["pool"][:, 0, 0]).long()]
            queries, targets = torch.nn.functional.normalize(pooled, dim=-1).chunk(2)
            return torch.nn.functional.cross_entropy(queries @ targets.T / TEMPERATURE, torch.arange(rows // 2))
        text = chosen_text(hidden)
        if stage == "bridge":
            return text
        rotary = language.rotary_emb(hidden, given["position_ids"])
        states = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        states = states[0] if isinstance(states, tuple) else states
        return text + MAE_WEIGHT * torch.nn.functional.mse_loss(drawn_by(states[at]), target)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model.model(**given, use_cache=False).last_hidden_state)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return run


def _pictures(layout: Layout, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """Of stage 1: pixels with the same noise, true pixels of the hidden units, the decoder's map, the units' tokens."""
    from cocoa_jax.models.mae import init_decoder
    from cocoa_jax.objectives.warmup import hide_units

    shown = np.asarray(hide_units(batch["patches"], batch["hidden_unit"], batch["unit_seed"]))[layout.patch_slots]
    hidden = batch["hidden_unit"][layout.unit_slots]
    units = batch["patches"].reshape(*batch["hidden_unit"].shape, -1)[layout.unit_slots]
    proj = np.asarray(init_decoder(layout.config, random_params(layout.config, SEED), SEED)["proj"]["kernel"])
    columns = np.nonzero(layout.theirs["input_ids"] == layout.config.image_token)
    return shown, units[hidden], proj, tuple(axis[hidden] for axis in columns)


def work(side: str, stage: str, rows: int) -> None:
    """A side's process: a step for every line that it is sent."""
    run = (torch_side if side == "torch" else our_side)(stage, rows, SIDES[side])
    for _ in sys.stdin:
        began, worked = time.perf_counter(), time.process_time()
        loss = run()
        told = {"s": time.perf_counter() - began, "processor s": time.process_time() - worked, "loss": loss}
        sys.stdout.write(json.dumps(told | {"peak": peak_gib()}) + "\n")
        sys.stdout.flush()


def compare(stage: str, rows: int, rounds: int) -> None:
    """Let the sides take turns and print what came of it."""
    sides = [side for side in SIDES if side != "kept" or stage == "contrastive"]  # others compute nothing again
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    processes = {}
    for side in sides:
        command = [sys.executable, __file__, "--worker", side, "--stages", stage, "--rows", str(rows)]
        processes[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(rounds + 1):
        for side, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            found[side].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    losses = {side: steps[0]["loss"] for side, steps in found.items()}
    print(f"{stage}: losses {', '.join(f'{side} {loss:.5f}' for side, loss in losses.items())}")
    theirs = found["torch"]
    for side, steps in found.items():
        ratios = []
        for unit in ("s", "processor s"):  # the first step compiles and warms up
            own, other = (float(np.median([step[unit] for step in some[1:]])) for some in (steps, theirs))
            ratios.append(f"{own:.2f} {unit} (torch / it {other / own:.2f})")
        share = steps[-1]["peak"] / theirs[-1]["peak"]
        print(f"  {side}: {', '.join(ratios)}, peak {steps[-1]['peak']:.2f} GiB ({share:.2f} of torch's)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--rows", type=int, default=16, help="of 352 tokens and a picture of 448 x 448; even")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.stages, options.rows)
        return
    size = f"{parameters(make_config('2', 'middle')) / 1e6:.0f}M parameters, {options.rows} rows of {TOKENS} tokens"
    print(f"{size}, {', '.join(f'{side} {how}' for side, how in SIDES.items())}")
    for stage in options.stages.split(","):
        compare(stage, options.rows, options.rounds)


if __name__ == "__main__":
    main()
