"""An XLA trace of real steps on the device that is here, for TensorBoard's profile plugin or xprof."""

from __future__ import annotations

from pathlib import Path

import jax

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import ProfileConfig, TrainConfig
from cocoa_jax.data.processor import Processor
from cocoa_jax.training.inputs import open_batches
from cocoa_jax.training.mesh import make_mesh
from cocoa_jax.training.optimizer import make_optimizer
from cocoa_jax.training.place import place
from cocoa_jax.training.stages import stage_program
from cocoa_jax.training.state import abstract_state, first_state
from cocoa_jax.training.step import make_step
from cocoa_jax.training.trace import TraceWindow

SETTLE = 2  # steps before the trace: the first compiles


def record_trace(config: TrainConfig, steps: int, output: str | Path) -> Path:
    """Run a stage's first steps from its checkpoint and record ``steps`` of them; nothing is saved.

    Returns:
        The folder to give to ``tensorboard --logdir`` or ``xprof``.
    Raises:
        ValueError: no steps, or more than the run has.
    """
    total = steps + SETTLE
    if steps < 1 or total > config.loop.steps:
        raise ValueError(f"{steps} steps to trace after {SETTLE}: give 1 to loop.steps - {SETTLE}, {config.loop.steps}")
    backbone, mesh = open_backbone(config.checkpoint), make_mesh(config.mesh)
    processor = Processor.load(backbone.side_files, backbone.config, config.data.processor)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    program = stage_program(config, backbone.config, (processor.mask_id, *processor.bridge_ids))
    wanted = abstract_state(program.shapes, optimizer, mesh)
    described = wanted.params["backbone"]
    loaded = backbone.load(described)
    params = jax.tree.map(lambda leaf, want: jax.device_put(leaf, want.sharding), loaded, described)
    state = first_state(program.first_params(params), optimizer, wanted)
    step = make_step(program.loss, optimizer, wanted, config.loop.steps)
    batches = iter(open_batches(config, processor))
    folder = Path(output)
    with TraceWindow(ProfileConfig(SETTLE, steps), folder) as trace:
        for number in range(total):
            batch = next(batches)
            del batch["stats"]
            with trace.step(number, state):
                state, _ = step(state, place(batch, mesh))
            trace.end(number, state)
    return folder
