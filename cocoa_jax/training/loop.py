"""The trainer of all three stages, read from top to bottom."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
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
from cocoa_jax.config import SettingsError, TrainConfig, differences, to_dict
from cocoa_jax.data.mixture import Mixture
from cocoa_jax.data.pipeline import STATS, stage_batches
from cocoa_jax.data.processor import Processor
from cocoa_jax.training.inputs import known_bad, open_sources
from cocoa_jax.training.mesh import batch_shards, make_mesh
from cocoa_jax.training.metrics import MetricsWriter
from cocoa_jax.training.optimizer import make_optimizer
from cocoa_jax.training.place import place
from cocoa_jax.training.stages import Program, stage_program
from cocoa_jax.training.state import TrainState, abstract_state, first_state, trained_part
from cocoa_jax.training.step import make_step

BAD_RECORDS = STATS.index("bad_records")
STOPPED = 75  # the exit status of a run that was asked to stop and saved first: "try again" to launchers


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), saved its state and can be continued by the same command."""


class Diverged(RuntimeError):
    """A loss that is no number; the message names the step and where the state before it is."""


def train(config: TrainConfig) -> Path:
    """Run one stage, or continue it where it was; returns its folder.

    Raises:
        SettingsError, PackingError: settings that contradict each other, the machine, or an earlier run in the folder.
        Diverged: the loss is NaN or infinite.
        Stopped: SIGTERM arrived.
    """
    # ------------------------------------------------------------------ what is asked for, checked before any work
    output = Path(config.output)
    backbone = open_backbone(config.checkpoint)
    mesh = make_mesh(config.mesh)
    config.data.rows.check_shared(batch_shards(mesh), "devices")
    processor = Processor.load(backbone.side_files, backbone.config, config.data.processor, config.data.decoded_mib)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    program = stage_program(config, backbone.config, (processor.mask_id, *processor.bridge_ids))
    wanted = abstract_state(program.shapes, optimizer, mesh)
    mixture = open_sources(config)
    batches = iter(open_batches(config, processor, mixture))

    # --------------------------------------------------------------------------------- the state: continued or new
    output.mkdir(parents=True, exist_ok=True)
    _check_settings(output / "config.json", to_dict(config))
    if config.data.mixture:
        _check_settings(output / "mixture.json", dict(mixture.identity))
    carry_backbone(backbone.side_files, output)
    with StageCheckpoints(output, config.loop.keep) as checkpoints, _stop_requests() as stopping:
        restored = checkpoints.restore_latest(_trees(wanted))
        if restored is None:
            params = _first_backbone(backbone, program, wanted.params["backbone"], output)
            state = first_state(program.first_params(params), optimizer, wanted)
        else:
            state = _state(restored, wanted, output)
            batches.set_state(restored.loop["batches"])
        start = int(state.step)
        if start >= config.loop.steps:
            return output

        # ------------------------------------------------------------------------------------------------ the loop
        step_function = make_step(program.loss, optimizer, wanted, config.loop.steps)
        metadata = {"stage": config.stage, "config": to_dict(config), "parent": backbone.origin()}
        if program.adapter is not None:
            metadata["adapter"] = program.adapter.to_json()
        pending: tuple[int, dict[str, Any], int] | None = None
        with MetricsWriter(output, config.stage, start, config.loop.steps) as writer:
            for step in range(start, config.loop.steps):
                batch = next(batches)
                stats = batch.pop("stats")
                pictures = count_pictures(batch)
                state, metrics = step_function(state, place(batch, mesh))
                # Read one step late, so that the device never waits for the host.
                if pending is not None:
                    _record(writer, pending, output)
                counts = {"rows": stats[1], "bad_records": stats[BAD_RECORDS], "dropped_masks": stats[-1]}
                pending = (step, metrics | counts, pictures)
                last, stop = step + 1 == config.loop.steps, stopping()  # asked once: a stop is always saved first
                if last or stop or (step + 1) % config.loop.checkpoint_every == 0:
                    _record(writer, pending, output)  # a state that diverged is never saved
                    pending = None
                    checkpoints.save(
                        step + 1,
                        params=None if program.adapter else state.params["backbone"],
                        adapter=state.params["adapter"] if program.adapter else None,
                        head=state.params["head"],
                        optimizer=state.optimizer,
                        loop={"step": step + 1, "batches": batches.get_state()},
                        metadata=metadata,
                    )
                if stop and not last:
                    raise Stopped(f"stopped at step {step + 1} of {config.loop.steps}: the same command continues")
    return output


def count_pictures(batch: Mapping[str, np.ndarray]) -> int:
    """How many pictures the rows of a batch show: patches that are the first of their span."""
    start, end = batch["patch_start"], batch["patch_end"]
    return int(np.sum((end > start) & (start == np.arange(start.shape[1]))))


# ------------------------------------------------------------------------------------------------------------ parts


def open_batches(config: TrainConfig, processor: Processor, mixture: Mixture | None = None) -> Any:
    """The batches that a run of these settings is fed on this host; ``mixture`` spares opening its data again."""
    mixture = open_sources(config) if mixture is None else mixture
    # Hosts draw the same records, so that one of them names the bad ones for all.
    report = Path(config.output) / "bad_records.jsonl" if jax.process_index() == 0 else None
    return stage_batches(
        config.batches(),
        mixture.sources,
        mixture.weights,
        processor,
        seed=config.seed,
        steps=config.loop.steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        known=known_bad(config, mixture),
        report=report,
        threads=config.data.threads,
        workers=config.data.workers,
    )


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """A folder belongs to one run: refuse to continue it with other settings, naming them."""
    if path.exists():
        changed = differences(json.loads(path.read_text()), settings)
        if changed:
            raise SettingsError(
                f"{path.parent} was made with other settings ({'; '.join(changed)}): give another output or remove it"
            )
    else:
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(settings, indent=1))
        os.replace(aside, path)


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


def _record(writer: MetricsWriter, pending: tuple[int, dict[str, Any], int], output: Path) -> None:
    step, metrics, pictures = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not (np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"])):
        raise Diverged(
            f"loss is {values['loss']} and gradient norm {values['gradient_norm']} at step {step}: the last checkpoint "
            f"in {output} is before it; lower optimizer.learning_rate or raise optimizer.warmup_steps"
        )
    writer.write(step, values, pictures)


@contextmanager
def _stop_requests() -> Iterator[Any]:
    """Turn SIGTERM, which announces a preemption, into a question that the loop asks once a step."""
    asked = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
