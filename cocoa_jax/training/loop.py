"""The trainer of all three stages, read from top to bottom."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cocoa_jax.checkpoints.added_tokens import with_mean_rows
from cocoa_jax.checkpoints.backbone import Backbone
from cocoa_jax.checkpoints.orbax import Restored, StageCheckpoints, base_folder, has_base, load_params, save_base
from cocoa_jax.checkpoints.places import folder_at, twin
from cocoa_jax.config import TrainConfig, to_dict
from cocoa_jax.data.pipeline import STATS, built_ahead, widest_bytes
from cocoa_jax.data.processor import Processor
from cocoa_jax.training.agreement import Disagreed, check_alike, check_planned, held_here, planned
from cocoa_jax.training.average import exchanged
from cocoa_jax.training.compilation import kept_programs
from cocoa_jax.training.divergence import Diverged, Pending, check_finite, check_weights
from cocoa_jax.training.flops import StepFlops
from cocoa_jax.training.folder import open_parent, origin_of, prepare
from cocoa_jax.training.hosts import ended_together, first_alone, is_first, join, row_share, stop_agreed, with_peers
from cocoa_jax.training.inputs import open_dataset, open_sources
from cocoa_jax.training.mesh import batch_shards, make_mesh
from cocoa_jax.training.metrics import MetricsWriter, NoMetrics
from cocoa_jax.training.optimizer import make_optimizer
from cocoa_jax.training.place import place
from cocoa_jax.training.stages import Program, stage_program
from cocoa_jax.training.state import TrainState, abstract_state, first_state, trained_part
from cocoa_jax.training.step import make_step
from cocoa_jax.training.throughput import Meter
from cocoa_jax.training.trace import TraceWindow
from cocoa_jax.training.weights_and_biases import WandbRun, check_installed

_LOGGED = ("rows_used", "examples_used", "extra_rows", "bad_records", "dropped_masks")  # of STATS
STOPPED = 75  # the exit status of a run that stopped or could not go on now: "try again" to launchers


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), saved its state and can be continued by the same command."""


def train(config: TrainConfig) -> Path:
    """Run one stage, or continue it where it was; returns its folder.

    Raises:
        SettingsError, PackingError: settings that contradict each other, the machine, or an earlier run in the folder.
        Diverged: the loss is NaN or infinite.
        Disagreed: processes of the run hold other settings, files or records than the others.
        Stopped: SIGTERM arrived, in any process of the run.
        PeerLost: another process of the run died.
        UnavailableCheckpointError: a checkpoint cannot be read now, for a reason that passes.
    """
    join(config.distributed)
    with with_peers(), kept_programs(config.loop.compilation_cache), ended_together(Stopped, Diverged, Disagreed):
        return _train(config)


def _train(config: TrainConfig) -> Path:
    # ------------------------------------------------------------------ what is asked for, checked before any work
    check_installed(config.loop.wandb)
    output = folder_at(config.output)
    backbone = open_parent(config)
    mesh = make_mesh(config.mesh)
    config.data.rows.check_shared(batch_shards(mesh), "devices")
    processor = Processor.load(backbone.side_files, backbone.config, config.data.processor, config.data.decoded_mib)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    program = stage_program(config, backbone.config, (processor.mask_id, *processor.bridge_ids))
    wanted = abstract_state(program.shapes, optimizer, mesh)
    mixture = open_sources(config)
    share = row_share(mesh)
    dataset = open_dataset(config, processor, mixture, share)
    meter = Meter(StepFlops(config, backbone.config), share.count)

    # --------------------------------------------------------------------------------- the state: continued or new
    check_alike(held_here(config, mixture, processor))
    first_alone("folder", lambda: prepare(config, mixture, backbone, processor.added))
    # In this order a signal in the middle of the last save, which is waited for, does not end it.
    with _stop_requests() as stopping, StageCheckpoints(output, config.loop.keep) as checkpoints:
        restored = checkpoints.restore_latest(_trees(wanted))
        if restored is None:
            params = _backbone(backbone, processor, program, wanted.params["backbone"], output)
            state = first_state(program.first_params(params), optimizer, wanted)
        else:
            state = exchanged(_state(restored, wanted, backbone, processor, program, output))
        start = int(state.step)
        if start >= config.loop.steps:
            return output

        # ------------------------------------------------------------------------------------------------ the loop
        step_function = make_step(program.loss, optimizer, wanted, config.loop.steps)
        largest = widest_bytes(config.batches(), processor, share)
        batches = iter(built_ahead(dataset[start:], config.data.threads, config.data.workers, largest))
        metadata: dict[str, Any] = {"stage": config.stage, "config": to_dict(config), "parent": origin_of(config)}
        metadata["data"] = mixture.fingerprint
        if program.adapter is not None:
            metadata["adapter"] = program.adapter.to_json()
        pending: Pending | None = None
        logs: MetricsWriter | NoMetrics = NoMetrics()
        window = None
        if is_first():
            wandb = None if config.loop.wandb is None else WandbRun(config.loop.wandb, config)
            logs = MetricsWriter(output, config.stage, start, config.loop.steps, meter, wandb)
            window = config.loop.profile
        with logs as writer, TraceWindow(window, twin(output) / "trace") as trace:
            for step in range(start, config.loop.steps):
                batch = next(batches)
                stats = batch.pop("stats")
                alike = planned(batch, stats, mesh, state)
                with trace.step(step, state):
                    state, metrics = step_function(state, place(batch, mesh))
                trace.end(step, state)
                # Read one step late, so that the device never waits for the host.
                if pending is not None:
                    _record(writer, pending, config, processor, meter, mesh)
                counts = {name.removesuffix("_used"): stats[STATS.index(name)] for name in _LOGGED}
                pending = Pending(step, metrics | counts, batch, stats, alike)
                last, stop = step + 1 == config.loop.steps, stopping(step)  # asked once: a stop is always saved first
                if last or stop or (step + 1) % config.loop.checkpoint_every == 0:
                    _record(writer, pending, config, processor, meter, mesh)  # a state that diverged is never saved
                    kept = exchanged(state)
                    check_weights(trained_part(kept.params), pending, config, processor)
                    pending = None
                    checkpoints.save(
                        step + 1,
                        params=None if program.adapter else kept.params["backbone"],
                        adapter=kept.params["adapter"] if program.adapter else None,
                        head=kept.params["head"],
                        optimizer=kept.optimizer,
                        loop={"step": step + 1},
                        metadata=metadata,
                    )
                    writer.carry()
                if stop and not last:
                    checkpoints.wait()  # who says that it saved must have
                    raise Stopped(f"stopped at step {step + 1} of {config.loop.steps}: the same command continues")
    return output


# ------------------------------------------------------------------------------------------------------------ parts


def _backbone(parent: Backbone, processor: Processor, program: Program, wanted: Any, output: Path) -> Any:
    """The weights that a run begins with, in their places; frozen ones are written down in its own folder, once."""
    if program.adapter is not None and has_base(output):
        return load_params(base_folder(output), wanted)
    params = jax.tree.map(lambda leaf, want: jax.device_put(leaf, want.sharding), parent.load(wanted), wanted)
    params = with_mean_rows(params, processor.added.values(), processor.used_rows)
    if program.adapter is not None:
        save_base(output, params)
    return params


def _trees(wanted: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: no backbone that has an adapter."""
    names = {"backbone": "params", "adapter": "adapter", "head": "head"}
    trees = {names[name]: tree for name, tree in trained_part(wanted.params).items()}
    return {**trees, "optimizer": wanted.optimizer}


def _state(
    restored: Restored, wanted: TrainState, parent: Backbone, processor: Processor, program: Program, output: Path
) -> TrainState:
    params = {"backbone": restored.params, "head": restored.head}
    if program.adapter is not None:
        base = _backbone(parent, processor, program, wanted.params["backbone"], output)
        params = {"backbone": base, "head": restored.head, "adapter": restored.adapter}
    # The counter too lies where the step leaves it: elsewhere it would cost a second compilation.
    return TrainState(jax.device_put(np.int32(restored.step), wanted.step.sharding), params, restored.optimizer)


def _record(
    writer: MetricsWriter | NoMetrics,
    pending: Pending,
    config: TrainConfig,
    processor: Processor,
    meter: Meter,
    mesh: Mesh,
) -> None:
    check_planned(pending.step, pending.planned, mesh)
    values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
    check_finite(pending, values, config, processor)
    predicted = 0.0 if config.stage == "contrastive" else values["masked_tokens"]
    writer.write(pending.step, values, meter.load(pending.batch, pending.stats, predicted))


@contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """Turn SIGTERM, which announces a preemption, into a question that the loop asks once a step."""
    if jax.process_count() > 1:  # JAX listens for the signal then, and has all processes stop at the same step
        yield stop_agreed
        return
    asked = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
