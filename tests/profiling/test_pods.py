"""The table of plans that is published: what the page says is what its files hold, and making them can be stopped."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cocoa_jax.config import TrainConfig, load_config
from cocoa_jax.models.qwen2_vl import abstract_params
from cocoa_jax.profiling.cells import MeasurementError
from cocoa_jax.profiling.plan_search import changed
from cocoa_jax.profiling.steps import read_backbone
from cocoa_jax.training.flops import StepFlops, Work

WANTED = "qwen2-vl-2b_,lora,v5e-4x4"
EXAMPLES = {"1-warmup": 128, "2-bridge": 64, "3-contrastive": 1024}


@pytest.fixture
def pods(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    found = importlib.import_module("benchmarks.pods")
    monkeypatch.setattr(found, "versions", lambda cell: {})  # of all code that is compiled: no figure depends on it
    return found


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_page_says_what_its_files_hold(pods):
    """Which cells are missing or of older code may differ: every change of the code changes that."""
    cells = pods.with_fewer(pods.all_cells())
    shown = pods.PAGE.read_text().split(pods.BEGIN)[1].split(pods.END)[0]
    assert rows(shown) == rows(pods.table(cells) + pods.memory_table(cells))
    assert {cell.file for cell, _ in pods.made(cells)} == set(pods.FOLDER.glob("*.json"))
    assert len(rows(shown)) > 30


@pytest.mark.parametrize("stage", EXAMPLES)
def test_the_smallest_backbone_fits_sixteen_chips_at_the_batch_sizes_of_the_paper(pods, stage):
    result = json.loads(pods.Cell("qwen2-vl-2b", stage, "lora", "v5e:4x4", 1).file.read_text())["result"]
    assert result["fits"] and result["needed"] < result["capacity"] == 15.75 * 2**30
    assert (result["examples"], result["devices"]) == (EXAMPLES[stage], 16)


def planned(pods):
    """The cells that fit: (cell, what is kept of it, its config, its backbone, chunks of rows in a step)."""
    for cell, kept in pods.made(pods.with_fewer(pods.all_cells())):
        if kept["result"]["fits"]:
            config = changed(load_config(TrainConfig, cell.path), cell.settings(kept["remat"]))
            rows = kept["result"]["batch"]["tokens"][0] // kept["result"]["devices"]
            chunks = rows // min(config.compute.chunk_rows or rows, rows)
            yield cell, kept, config, read_backbone(config.checkpoint), chunks


def test_the_weights_of_all_layers_are_gathered_for_every_pass(pods):
    """Counted apart from the compiled text: forward and backward of each chunk of rows, in stage 3 twice forward."""
    seen = 0
    for cell, kept, config, backbone, chunks in planned(pods):
        result, shards = kept["result"], kept["result"]["mesh"]["fsdp"]
        if shards == 1:
            continue
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(backbone))
        kernels = sum(leaf.size for path, leaf in leaves if re.search("layers.*kernel", jax.tree_util.keystr(path)))
        one_pass = jnp.dtype(config.compute.dtype).itemsize * kernels * (1 - 1 / shards)
        sent = sum(row["bytes"] for row in result["sent"] if (row["kind"], row["axis"]) == ("all-gather", "fsdp"))
        assert 2 <= sent / one_pass / chunks < 4, cell.name
        seen += 1
    assert seen > 30


def test_flops_are_those_of_the_arithmetic_and_of_what_is_computed_again(pods):
    """An adapter takes a pass forward and one backward, all weights two backward; one more for each recomputation."""
    for cell, kept, config, backbone, chunks in planned(pods):
        rows, negatives, vision = config.data.rows, config.data.negatives, backbone.vision
        (B, T, P), N = rows.widest, rows.batch_size
        pairs = (N, N * (1 + negatives)) if config.stage == "contrastive" else (0, 0)
        documents = min(rows.examples_per_row, -(-(sum(pairs) or N) // B))
        windows = B * P * (vision.window // vision.patch_size) ** 2
        predicted = 0 if any(pairs) else B * rows.masked_per_row
        work = Work(B * T, B * P, B * T * T / documents, B * P * P / documents, windows, predicted, *pairs)
        again = (kept["remat"] == "full") + (any(pairs) and chunks > 1 and config.compute.chunk_remat)
        passes = 3 if config.lora is None else 2
        counted = kept["result"]["flops"] * kept["result"]["devices"] / StepFlops(config, backbone)(work)
        assert counted == pytest.approx((passes + again) / passes, rel=0.08), cell.name


def test_making_them_stops_and_goes_on(pods, monkeypatch, tmp_path):
    """One does not fit by the first policy, is interrupted and then fails; what is made is not made again."""
    kept = {stage: pods.Cell("qwen2-vl-2b", stage, "lora", "v5e:4x4", 1).file.read_text() for stage in EXAMPLES}
    monkeypatch.setattr(pods, "FOLDER", tmp_path / "pods")
    monkeypatch.setattr(pods, "PAGE", Path(shutil.copy(pods.PAGE, tmp_path)))
    asked, failures = [], {1: KeyboardInterrupt, 3: MeasurementError}

    class Fake:
        def __init__(self, folder):
            assert folder is None

        def get(self, spec):
            place, config = len(asked), spec["config"]
            asked.append((Path(config["checkpoint"]).name, config["stage"], config["compute"]["remat"]))
            if place in failures:
                raise failures[place]("the compiler died")
            (stage,) = (stage for stage in EXAMPLES if stage.endswith(config["stage"]))
            fits = (config["stage"], config["compute"]["remat"]) != ("bridge", "products")
            return json.loads(kept[stage])["result"] | {"fits": fits}

    monkeypatch.setattr(pods, "Cells", Fake)
    monkeypatch.setattr(sys, "argv", ["pods.py", "--only", WANTED])
    with pytest.raises(KeyboardInterrupt):
        pods.main()
    assert [path.name for path in pods.FOLDER.iterdir()] == ["qwen2-vl-2b_1-warmup_lora_v5e-4x4.json"]
    for _ in range(3):  # the first passes over what fails, the second makes that, and nothing is left for the third
        pods.main()
    warmup, bridge, full, last = (
        ("qwen2-vl-2b", *words)
        for words in (("warmup", "products"), ("bridge", "products"), ("bridge", "full"), ("contrastive", "products"))
    )
    assert asked == [warmup, bridge, bridge, full, last, bridge, full]
    remat = {row.split(" | ")[1]: row.split(" | ")[5] for row in rows(pods.PAGE.read_text()) if "v5e:4x4 |" in row}
    assert remat == {"1-warmup": "products", "2-bridge": "full", "3-contrastive": "products"}
