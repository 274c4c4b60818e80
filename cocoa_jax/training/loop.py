"""The trainer of all three stages, read from top to bottom."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from cocoa_jax.checkpoints.backbone import Backbone, open_backbone
from cocoa_jax.checkpoints.orbax import (
    Restored,
    StageCheckpoints,
    base_folder,
    carry_backbone,
    has_base,
    load_params,
    save_base,
)
from cocoa_jax.checkpoints.places import folder_at, twin
from cocoa_jax.config import SettingsError, TrainConfig, differences, to_dict
from cocoa_jax.data.mixture import Mixture
from cocoa_jax.data.pipeline import STATS, stage_batches
from cocoa_jax.data.processor import Processor
from cocoa_jax.training.average import exchanged
from cocoa_jax.training.compilation import kept_programs
from cocoa_jax.training.divergence import Pending, check_finite
from cocoa_jax.training.flops import StepFlops
from cocoa_jax.training.hosts import ALONE, RowShare, first_alone, is_first, join, row_share, stop_agreed, with_peers
from cocoa_jax.training.inputs import known_bad, open_sources
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

BAD_RECORDS = STATS.index("bad_records")
_HOW = (
    "mesh",
    "distributed",
    "data.threads",
    "loop.checkpoint_every",
    "loop.keep",
    "loop.profile",
    "loop.compilation_cache",
    "loop.wandb",
)
STOPPED = 75  # the exit status of a run that stopped and that the same command continues: "try again" to launchers


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), saved its state and can be continued by the same command."""


def train(config: TrainConfig) -> Path:
    """Run one stage, or continue it where it was; returns its folder.

    Raises:
        SettingsError, PackingError: settings that contradict each other, the machine, or an earlier run in the folder.
        Diverged: the loss is NaN or infinite.
        Stopped: SIGTERM arrived, in any process of the run.
        PeerLost: another process of the run died.
    """
    join(config.distributed)
    with with_peers(), kept_programs(config.loop.compilation_cache):
        return _train(config)


def _train(config: TrainConfig) -> Path:
    # ------------------------------------------------------------------ what is asked for, checked before any work
    check_installed(config.loop.wandb)
    output = folder_at(config.output)
    backbone = open_backbone(config.checkpoint)
    mesh = make_mesh(config.mesh)
    config.data.rows.check_shared(batch_shards(mesh), "devices")
    processor = Processor.load(backbone.side_files, backbone.config, config.data.processor, config.data.decoded_mib)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    program = stage_program(config, backbone.config, (processor.mask_id, *processor.bridge_ids))
    wanted = abstract_state(program.shapes, optimizer, mesh)
    mixture = open_sources(config)
    share = row_share(mesh)
    batches = iter(open_batches(config, processor, mixture, share))
    meter = Meter(StepFlops(config, backbone.config), share.count)

    # --------------------------------------------------------------------------------- the state: continued or new
    first_alone("folder", lambda: _prepare(config, mixture, backbone))
    with StageCheckpoints(output, config.loop.keep) as checkpoints, _stop_requests() as stopping:
        restored = checkpoints.restore_latest(_trees(wanted))
        if restored is None:
            params = _first_backbone(backbone, program, wanted.params["backbone"], output)
            state = first_state(program.first_params(params), optimizer, wanted)
        else:
            state = exchanged(_state(restored, wanted, output))
            batches.set_state(restored.loop["batches"])
        start = int(state.step)
        if start >= config.loop.steps:
            return output

        # ------------------------------------------------------------------------------------------------ the loop
        step_function = make_step(program.loss, optimizer, wanted, config.loop.steps)
        metadata = {"stage": config.stage, "config": to_dict(config), "parent": backbone.origin()}
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
                with trace.step(step, state):
                    state, metrics = step_function(state, place(batch, mesh))
                trace.end(step, state)
                # Read one step late, so that the device never waits for the host.
                if pending is not None:
                    _record(writer, pending, config, processor, meter)
                counts = {"rows": stats[1], "bad_records": stats[BAD_RECORDS], "dropped_masks": stats[-1]}
                pending = Pending(step, metrics | counts, batch, stats)
                last, stop = step + 1 == config.loop.steps, stopping(step)  # asked once: a stop is always saved first
                if last or stop or (step + 1) % config.loop.checkpoint_every == 0:
                    _record(writer, pending, config, processor, meter)  # a state that diverged is never saved
                    pending = None
                    kept = exchanged(state)
                    checkpoints.save(
                        step + 1,
                        params=None if program.adapter else kept.params["backbone"],
                        adapter=kept.params["adapter"] if program.adapter else None,
                        head=kept.params["head"],
                        optimizer=kept.optimizer,
                        loop={"step": step + 1, "batches": batches.get_state()},
                        metadata=metadata,
                    )
                    writer.carry()
                if stop and not last:
                    checkpoints.wait()  # who says that it saved must have
                    raise Stopped(f"stopped at step {step + 1} of {config.loop.steps}: the same command continues")
    return output


# ------------------------------------------------------------------------------------------------------------ parts


def open_batches(
    config: TrainConfig, processor: Processor, mixture: Mixture | None = None, share: RowShare = ALONE
) -> Any:
    """The batches that a run of these settings is fed on this host; ``mixture`` spares opening its data again."""
    mixture = open_sources(config) if mixture is None else mixture
    # Hosts draw the same records, so that one of them names the bad ones for all.
    report = twin(config.output) / "bad_records.jsonl" if is_first() else None
    return stage_batches(
        config.batches(),
        mixture.sources,
        mixture.weights,
        processor,
        seed=config.seed,
        steps=config.loop.steps,
        process_index=share.index,
        process_count=share.count,
        known=known_bad(config, mixture),
        report=report,
        threads=config.data.threads,
        workers=config.data.workers,
    )


def _prepare(config: TrainConfig, mixture: Mixture, backbone: Backbone) -> None:
    """Make the folder of the stage, or see that it is one of the same run."""
    output = folder_at(config.output)
    output.mkdir(parents=True, exist_ok=True)
    _check_settings(output / "config.json", to_dict(config))
    if config.data.mixture:
        _check_settings(output / "mixture.json", dict(mixture.identity))
    carry_backbone(backbone.side_files, output)


def _what(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that only say how a run is spread and saved: it may continue on other machines."""
    kept = {name: part for name, part in settings.items() if name not in _HOW}
    return {
        name: {key: value for key, value in part.items() if f"{name}.{key}" not in _HOW}
        if isinstance(part, dict)
        else part
        for name, part in kept.items()
    }


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """A folder belongs to one run: refuse to continue it with other settings, naming them."""
    if path.exists():
        changed = differences(_what(json.loads(path.read_text())), _what(settings))
        if changed:
            raise SettingsError(
                f"{path.parent} was made with other settings ({'; '.join(changed)}): give another output or remove it"
            )
    else:
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(settings, indent=1))
        aside.replace(path)


def _first_backbone(backbone: Backbone, program: Program, wanted: Any, output: Path) -> Any:
    """The weights that a new run begins with, in their places; frozen ones are written down in its own folder."""
    if program.adapter is not None and has_base(output):
        return load_params(base_folder(output), wanted)
    params = jax.tree.map(lambda leaf, want: jax.device_put(leaf, want.sharding), backbone.load(wanted), wanted)
    if program.adapter is not None:
        save_base(output, params)
    return params


def _trees(wanted: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: no backbone that has an adapter."""
    names = {"backbone": "params", "adapter": "adapter", "head": "head"}
    trees = {names[name]: tree for name, tree in trained_part(wanted.params).items()}
    return {**trees, "optimizer": wanted.optimizer}


def _state(restored: Restored, wanted: TrainState, output: Path) -> TrainState:
    params = {"backbone": restored.params, "head": restored.head}
    if "adapter" in wanted.params:
        base = load_params(base_folder(output), wanted.params["backbone"])
        params = {"backbone": base, "head": restored.head, "adapter": restored.adapter}
    # The counter too lies where the step leaves it: elsewhere it would cost a second compilation.
    return TrainState(jax.device_put(np.int32(restored.step), wanted.step.sharding), params, restored.optimizer)


def _record(
    writer: MetricsWriter | NoMetrics, pending: Pending, config: TrainConfig, processor: Processor, meter: Meter
) -> None:
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
