"""Plans: a real compilation of a small stage, what is refused, and what is advised where a step does not fit."""

import dataclasses
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cocoa_jax import cli
from cocoa_jax.chips import CHIPS
from cocoa_jax.commands import planning
from cocoa_jax.config import SettingsError, TrainConfig, load_config, parse, to_dict
from cocoa_jax.models.lora import LoraConfig
from cocoa_jax.profiling import plan as plan_module
from cocoa_jax.profiling.cells import Cells
from cocoa_jax.profiling.model import ProgramCost
from cocoa_jax.profiling.plan import PlanError, needed_bytes, plan_spec, plan_step
from cocoa_jax.profiling.plan_report import memory_kinds, plan_markdown, ratio, serial_seconds
from cocoa_jax.profiling.plan_run import plan, search
from cocoa_jax.profiling.plan_search import candidates, changed, remedies
from cocoa_jax.profiling.step_cost import check_step
from cocoa_jax.profiling.steps import abstract_step
from cocoa_jax.profiling.topology import parse_topology
from cocoa_jax.training.mesh import mesh_sizes

REPOSITORY = Path(__file__).parents[2]
GIB = 2.0**30
PODS = sorted((REPOSITORY / "configs/pods").glob("*.yaml"))


@pytest.fixture(scope="module")
def small(backbone, stage_settings, tmp_path_factory):
    """A small stage 3 in chunks of rows."""
    settings = stage_settings("contrastive", backbone, tmp_path_factory.mktemp("plan"))
    return parse(TrainConfig, settings | {"mesh": {"data": 1, "fsdp": -1}, "compute": {"chunk_rows": 2}})


def test_a_plan_of_a_small_step(small):
    result = Cells(None).get(plan_spec(small, "v5e:2x2", 1))
    kinds = memory_kinds(result)
    assert result["fits"] and 0 < result["held"]["trained weights"] < result["held"]["optimizer"]
    assert sum(kinds.values()) == pytest.approx(result["needed"]) and min(kinds.values()) >= 0
    moved = result["bytes"] / CHIPS["v5e"].hbm_bandwidth  # what moves beside the operations too
    assert result["chip_seconds"] == pytest.approx(max(sum(result["spent"].values()), moved))
    assert result["step_seconds"] == max(result[f"{name}_seconds"] for name in ("chip", "interconnect", "network"))
    assert serial_seconds(result) > result["step_seconds"] and ratio(result) >= 1
    assert result["held"]["next batch"] == result["held"]["batch"] > 0  # is sent while a step runs
    assert result["needed"] > result["arguments"] + result["held"]["next batch"]
    assert result["network_seconds"] == 0 and result["missing"] == []
    text = plan_markdown(result)
    assert "static model: compiled for that slice, not run" in text and "measured" not in text
    assert all(f"  * {name}: " in text for name in ("trained weights", "optimizer", "padding"))
    assert "frozen" not in text  # all of it trains
    assert f"ideal MXU time {result['mxu_seconds'] * 1e3:.1f} ms\n" in text and result["mxu_seconds"] > 0
    assert f"bound by {result['bound']}\n" in text and f"compiled in {result['compile_seconds']:.0f} s" in text
    assert ("all-gather", "fsdp") in {(row["kind"], row["axis"]) for row in result["sent"]}
    for row in result["sent"]:
        assert f"\n| {row['kind']} | {row['axis']} | {row['sites']} | {row['runs']} | " in text


def test_a_plan_of_two_slices(small):
    """Only gradients and embeddings leave a slice; what stays inside is as in one."""
    two = Cells(None).get(plan_spec(small, "v5e:2x2", 2))
    assert two["mesh"]["slice"] == 2 and two["devices"] == 8
    assert two["network_seconds"] > 0 and "data-centre network" in plan_markdown(two)
    axes = {row["axis"] for row in two["sent"]}
    assert {"slice", "fsdp"} <= axes and "other" not in axes
    # Not more than gradients in float32, embeddings and theirs, and a few numbers.
    between = sum(row["bytes"] for row in two["sent"] if "slice" in row["axis"].split("+"))
    assert 0 < between < 2 * two["held"]["trained weights"] + 2**16


def test_the_batch_that_comes_next_may_be_too_much(small, monkeypatch):
    """A step that compiles does not fit where there is no room to send the next batch."""
    spec = plan_spec(small, "v5e:1x1", 1)
    monkeypatch.setattr(plan_module, "abstract_step", lambda *given: (_Step(), *abstract_step(*given)[1:]))
    monkeypatch.setattr(plan_module, "program_cost", lambda *given: ProgramCost(CHIPS["v5e"], (), 0.0, ()))
    batch = plan_step(spec, Path())["held"]["batch"]
    for free, fits in ((batch, True), (batch - 1, False)):
        _Step.peak = int(CHIPS["v5e"].hbm_bytes) - free
        assert plan_step(spec, Path())["fits"] is fits


def test_frozen_weights_of_an_adapter_are_a_kind_of_their_own(small, monkeypatch):
    monkeypatch.setattr(plan_module, "abstract_step", lambda *given: (_Step(), *abstract_step(*given)[1:]))
    monkeypatch.setattr(plan_module, "program_cost", lambda *given: ProgramCost(CHIPS["v5e"], (), 0.0, ()))
    monkeypatch.setattr(_Step, "peak", int(2 * CHIPS["v5e"].hbm_bytes))
    adapted = dataclasses.replace(small, lora=LoraConfig(rank=2))
    result = plan_step(plan_spec(adapted, "v5e:1x1", 1), Path())
    assert result["held"]["frozen weights"] > result["held"]["trained weights"] > 0
    assert "  * frozen weights: " in plan_markdown(result)


class _Step:
    """A step that compiles, and takes so much."""

    peak = 0

    def lower(self, *given):
        return self

    compile = lower

    def memory_analysis(self):
        return SimpleNamespace(peak_memory_in_bytes=self.peak, argument_size_in_bytes=0, temp_size_in_bytes=0)

    def as_text(self):
        return "HloModule x\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"


def test_a_step_that_does_not_fit_is_a_failure_with_a_remedy(small, tmp_path, capsys):
    """A device has 30,002 rows, and there is one knob: to take half of them at a time, which is not enough.

    It is kept, as all knobs together are the same one: two compilations.
    """
    rows = dataclasses.replace(small.data.rows, shapes=((120_008, 48, 32),))
    compute = dataclasses.replace(small.compute, remat="full", chunk_rows=None)
    wide = dataclasses.replace(small, data=dataclasses.replace(small.data, rows=rows), compute=compute)
    path = tmp_path / "wide.yaml"
    path.write_text(yaml.safe_dump(to_dict(wide)))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "--config", str(path), "--topology", "v5e:2x2", "--cells", str(tmp_path / "cells")])
    shown, said = capsys.readouterr()
    assert stopped.value.code == 1 and "DOES NOT FIT" in shown
    last = said.strip().splitlines()[-1]
    assert last.startswith("cocoa: stage contrastive needs ") and "of 15.75 GiB a device" in last
    saved = re.search(r" on v5e:2x2: --compute\.chunk_rows=15001 saves (\d+\.\d\d) GiB and does not fit alone; ", last)
    assert saved and float(saved[1]) > 1, last
    assert len(list((tmp_path / "cells").iterdir())) == 2


# ----------------------------------------------------------------------------------------------- advice and search


class Made(Cells):
    """Cells whose figures follow a rule instead of a compiler: memory and time by the settings."""

    def __init__(self, capacity: float):
        super().__init__(None)
        self.capacity, self.asked = capacity * GIB, []

    def get(self, spec):
        config = parse(TrainConfig, spec["config"])
        self.asked.append(config)
        rows, shards = config.compute.chunk_rows or 8, mesh_sizes(config.mesh, 16)[2]
        needed = (2.0 * rows + 40 / shards) * (1 if config.compute.remat == "full" else 1.5) * GIB
        seconds = 1.0 + 1 / rows + 0.01 * shards + (0.3 if config.compute.remat == "full" else 0)
        names = ("chip", "interconnect", "network", "mxu", "step", "compile")
        return {
            "stage": config.stage, "topology": spec["topology"], "slices": 1, "devices": 16, "mesh": {"fsdp": shards},
            "batch": {"tokens": [512, 1280], "patches": [512, 4096, 1176]}, "examples": 1024,
            "held": {"trained weights": GIB}, "arguments": GIB, "capacity": self.capacity, "needed": needed,
            "fits": needed <= self.capacity, "flops": 1.0, "bytes": 1.0, "bound": "matrix units of the chip",
            "spent": {"matrix units": seconds}, "sent": [], "unknown": [], "missing": [],
            **{f"{n}_seconds": seconds for n in names},
        }  # fmt: skip


@pytest.fixture
def stage3():
    config = load_config(TrainConfig, REPOSITORY / "configs/pods/3-contrastive-lora.yaml")
    return changed(config, {"compute.chunk_rows": 8, "compute.remat": "attention"})


def test_the_remedies_are_named_with_what_they_save(stage3):
    cells, shown, said = Made(20), [], []
    with pytest.raises(PlanError) as failed:
        plan(stage3, "v5e:4x4", 1, cells, said.append, shown.append)
    text = str(failed.value)
    # (2 x 8 + 40 / 16) x 1.5 = 27.75 GiB; full remat 18.50, half the rows 15.75, a quarter of them 9.75.
    assert "needs 27.75 GiB of 20.00 GiB" in text and "\n" not in text
    assert "--compute.remat=full saves 9.25 GiB and fits" in text
    assert (
        "--compute.chunk_rows=4 saves 12.00 GiB and fits" in text and "--compute.chunk_rows=2 saves 18.00 GiB" in text
    )
    assert "DOES NOT FIT" in shown[0] and len(said) == len(cells.asked) - 1


def test_the_figures_of_a_plan_are_printed(stage3):
    figures = {
        "flops": 3e12, "mxu_seconds": 0.02, "chip_seconds": 0.03, "interconnect_seconds": 0.05, "network_seconds": 0.0,
        "step_seconds": 0.05, "bound": "interconnect", "compile_seconds": 41.6, "bytes": 2.5 * GIB,
        "spent": {"matrix units": 0.021, "instructions": 0.009, "memory": 0.0},
        "sent": [{"kind": "all-gather", "axis": "fsdp", "sites": 3, "runs": 84, "bytes": 1.5 * GIB}],
    }  # fmt: skip
    text = plan_markdown(Made(30).get(plan_spec(stage3, "v5e:4x4", 1)) | figures)
    assert "* 3.00 TFLOP a device, recomputation included: ideal MXU time 20.0 ms\n" in text
    assert ": 30.0 ms, by what bounds each operation: matrix units 21.0, instructions 9.0, memory 0.0; 2.5 GiB" in text
    assert "**a step takes at least 50.0 ms**, 2.50 x the ideal MXU time, " in text
    assert ", 80.0 ms if nothing is; bound by interconnect\n* compiled in 42 s, here\n" in text
    assert text.endswith("---: |\n| all-gather | fsdp | 3 | 84 | 1,536.0 |\n")


def test_knobs_that_help_only_together_are_tried_together(stage3):
    with pytest.raises(PlanError, match="does not fit alone") as failed:
        plan(stage3, "v5e:4x4", 1, Made(8), lambda _: None, lambda _: None)
    assert "--compute.remat=full --compute.chunk_rows=2 saves 21.25 GiB and fits" in str(failed.value)


def test_nothing_is_said_to_help_that_does_not(stage3):
    config = changed(stage3, {"compute.chunk_rows": 1, "compute.remat": "full"})
    with pytest.raises(PlanError, match=r"no setting saves memory: take a larger slice or smaller rows\.shapes"):
        plan(config, "v5e:4x4", 1, Made(1), lambda _: None, lambda _: None)


@pytest.mark.parametrize(
    ("topology", "slices", "settings", "message"),
    [
        ("v5e:4x4", 1, {"mesh.fsdp": 5}, "does not come to the 16 devices that there are: make mesh.fsdp a divisor"),
        ("v5e:4x4", 1, {"mesh.slice": 2}, "mesh.slice is 2, the number of slices is 1: leave it at -1"),
        ("v5e:4x4", 2, {"mesh.slice": 1}, "mesh.slice is 1, the number of slices is 2: leave it at -1"),
        ("v5e:4x4", 1, {"compute.chunk_rows": 5}, "compute.chunk_rows is 5, a device has 32 rows: choose a divisor"),
        ("v5e:16x16", 2, {}, "256 rows of (256, 1280, 4096) cannot be shared by 512 devices: change data.rows.shapes"),
        ("v5e:16x16", 0, {}, "0 slices of v5e:16x16: give 1 or more"),
        ("v5e:4x4", 1, {"checkpoint": "nowhere"}, "nowhere holds no config.json: give the folder of a Qwen2-VL"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_a_process_is_started(stage3, topology, slices, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        plan_spec(changed(stage3, settings), topology, slices)
    assert "\n" not in str(caught.value)


def test_slices_that_no_setting_names_are_planned_for(stage3):
    assert plan_spec(stage3, "v5e:4x4", 2)["config"]["mesh"]["slice"] == -1


def test_a_step_that_fits_is_no_failure(stage3):
    shown = []
    plan(stage3, "v5e:4x4", 1, Made(30), lambda _: None, shown.append)
    assert "fits" in shown[0] and "DOES NOT" not in shown[0]


def test_a_search_ranks_what_fits_by_time(stage3):
    cells = Made(20)
    text = search(stage3, "v5e:4x4", 1, 20, cells, lambda _: None)
    times = [float(line.split("|")[3]) for line in text.splitlines() if line.startswith("| `")]
    assert times == sorted(times) and 0 < len(times) < len(cells.asked)
    with pytest.raises(PlanError, match="none of 3 settings fits"):
        search(stage3, "v5e:4x4", 1, 3, Made(1), lambda _: None)


def on_pods(path, devices):
    """A config of configs/pods with a batch that so many devices can share."""
    config = load_config(TrainConfig, path)
    times = -(-devices // config.data.rows.shapes[0][0])
    return changed(
        config, {"data.rows.shapes": tuple((rows * times, *rest) for rows, *rest in config.data.rows.shapes)}
    )


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("topology", "slices", "mesh"), [
    ("v5e:4x4", 1, {}), ("v5e:8x8", 1, {}), ("v5e:4x4", 2, {}), ("v5e:4x4", 1, {"mesh.fsdp": 2, "mesh.tensor": 4}),
    ("v5e:4x4", 2, {"mesh.slice": 2}),
])  # fmt: skip
def test_what_is_tried_can_be_compiled(path, topology, slices, mesh):
    """Every candidate and remedy is a mesh of these devices whose rows and chunks come out even."""
    devices = parse_topology(topology, slices)[1]
    config = changed(on_pods(path, devices), mesh)
    tried = [*candidates(config, topology, slices), *remedies(config, topology, slices)]
    assert len(tried) == len({str(choice) for choice in tried}) > 3
    for choice in tried:
        one = changed(config, choice)
        check_step(one, topology, slices)
        found, data, fsdp, tensor = mesh_sizes(one.mesh, devices, slices)
        assert found == slices and found * data * fsdp * tensor == devices
        own = one.data.rows.widest.rows // (slices * data * fsdp)
        assert own % min(own, one.compute.chunk_rows or own) == 0


@pytest.mark.parametrize(
    ("topology", "slices", "mesh", "own"),
    [("v5e:4x4", 1, {}, 32), ("v5e:4x4", 2, {}, 16), ("v5e:4x4", 1, {"mesh.fsdp": 4, "mesh.tensor": 4}, 128)],
)
def test_remedies_begin_with_the_rows_that_a_device_has(stage3, topology, slices, mesh, own):
    """512 rows over the devices of all slices, but for those that share the same rows."""
    config = changed(stage3, {"compute.chunk_rows": None, **mesh})
    name, found = "compute.chunk_rows", remedies(config, topology, slices)
    assert [choice[name] for choice in found if name in choice] == [own // 2, own // 4]


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("topology", "slices"), [("v5e:4x4", 1), ("v5e:8x8", 2)])
def test_twelve_candidates_hold_several_of_everything(path, topology, slices):
    config = on_pods(path, parse_topology(topology, slices)[1])
    first = list(itertools.islice(candidates(config, topology, slices), 12))
    names = {name for choice in first for name in choice}
    values = {name: {choice[name] for choice in first} for name in names}
    assert len(values["mesh.fsdp"]) >= 3 and values["compute.remat"] == {"products", "attention", "full", "none"}
    chunks = {remat: set() for remat in values["compute.remat"]}
    for choice in first:
        chunks[choice["compute.remat"]].add((choice["compute.chunk_rows"], choice.get("compute.chunk_tokens")))
    assert min(map(len, chunks.values())) >= 2  # every policy is tried with several chunk sizes
    assert len(set.union(*chunks.values())) >= 3 and ("compute.chunk_tokens" in names) == (
        config.stage != "contrastive"
    )
    if config.stage == "contrastive":
        assert {choice["compute.chunk_remat"] for choice in first} == {True, False}
    given = changed(config, first[0])  # the config as it is, but for sizes that come to the same
    assert (given.mesh, given.compute.remat) == (config.mesh, config.compute.remat)


def test_a_search_begins_with_the_mesh_of_the_config(stage3):
    given = changed(stage3, {"mesh.data": 4, "mesh.fsdp": -1})
    assert next(candidates(given, "v5e:4x4", 1))["mesh.fsdp"] == 4


def test_a_search_of_what_cannot_be_compiled_says_why(stage3):
    few = changed(stage3, {"data.rows.shapes": ((128, 1280, 4096),)})
    with pytest.raises(ValueError, match=r"cannot be shared by 512 devices: change data\.rows\.shapes"):
        search(few, "v5e:16x16", 2, 3, Made(20), lambda _: None)


# ------------------------------------------------------------------------------------------------------- the rest


def test_settings_are_replaced_by_their_names(stage3):
    other = changed(stage3, {"mesh.fsdp": 4, "lora.rank": 16})
    assert (other.mesh.fsdp, other.lora.rank, other.data) == (4, 16, stage3.data)
    with pytest.raises(SettingsError, match="MeshConfig has no setting 'fdsp'"):
        changed(stage3, {"mesh.fdsp": 4})


def test_the_compilers_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory "
        "space hbm. Used 18.53G of 15.75G hbm. Exceeded hbm capacity by 2.78G.\n\nTotal hbm usage >= 18.78G:"
    )
    assert needed_bytes(message) == 18.53 * GIB
    with pytest.raises(PlanError, match="the step does not compile: INTERNAL: Mosaic failed"):
        needed_bytes("INTERNAL: Mosaic failed to compile TPU kernel\nand more")


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_configs_of_pods_are_whole(path):
    """Sizes come from the backbone named in the file, and the step of each can be described."""
    config = load_config(TrainConfig, path)
    assert config.batches() and (config.lora is None) == path.stem.endswith("full")
    assert config.data.rows.batch_size == {"warmup": 128, "bridge": 64, "contrastive": 1024}[config.stage]
    assert config.optimizer.learning_rate == 2e-5 and config.contrastive.temperature == 0.02


def test_the_command_is_there():
    assert cli.commands()["plan"] is planning.PLAN
