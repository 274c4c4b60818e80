"""The train step: the same on one device and on meshes of eight, and its state is used up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cocoa_jax.training.mesh import MeshConfig, make_mesh
from cocoa_jax.training.state import abstract_state, first_state
from cocoa_jax.training.step import make_step

STAGES = ("warmup", "bridge", "contrastive")
EIGHT = ("data", "fsdp", "cube")
# The meshes that each is run on. The loss of stage 3 sees the rows of all slices.
RUNS = {"warmup": EIGHT, "bridge": EIGHT, "contrastive": ("fsdp", "cube", "slices")}
RUNS |= {"lora": ("data", "cube"), "lora-contrastive": ("fsdp",), "bfloat16": ("cube",)}
WORKER = Path(__file__).with_name("many_devices.py")


@pytest.fixture(scope="module")
def runs(backbone, stage_settings, tmp_path_factory):
    # A step size at which rounding is not blown up: what is compared is the gradient, not chaos.
    gentle = {
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 2},
        "contrastive": {"temperature": 0.1, "first_temperature": 0.5},
    }
    settings = {stage: stage_settings(stage, backbone, tmp_path_factory.mktemp(stage), **gentle) for stage in STAGES}
    adapter = {"lora": {"rank": 4, "alpha": 8.0}}  # DoRA with dropout, and trained rows
    settings |= {"lora": settings["bridge"] | adapter, "lora-contrastive": settings["contrastive"] | adapter}
    settings["bfloat16"] = settings["contrastive"] | {"compute": {"dtype": "bfloat16"}}
    # Unoptimised code: most of the time of this test is compilation.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(WORKER), json.dumps({name: (settings[name], RUNS[name]) for name in RUNS})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "mesh"), [(name, mesh) for name, meshes in RUNS.items() for mesh in meshes])
def test_ten_losses_agree_on_one_device_and_on_every_mesh_of_eight(runs, name, mesh):
    """With chunks of rows and tokens on the meshes, and all at once on one device: neither is in the result."""
    one, eight = runs[name]["one"], runs[name][mesh]
    assert len(one["losses"]) == 10 and np.isfinite(one["losses"]).all() and len(set(one["losses"])) == 10
    # bfloat16 holds 8 bits: sums that run in another order are rounded otherwise.
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-2 if name == "bfloat16" else 1e-5)


@pytest.mark.parametrize("mesh", ["one", "cube"])
def test_computing_in_bfloat16_keeps_weights_and_losses_in_float32(runs, mesh):
    """And its losses are those of float32 but for what 8 bits round, where they move by much more in ten steps."""
    low, full = runs["bfloat16"][mesh], runs["contrastive"]["one"]["losses"]
    assert low["types"] == {"params": ["float32"], "optimizer": ["float32", "int32"], "loss": ["float32"]}
    np.testing.assert_allclose(low["losses"], full, rtol=1e-2)
    assert low["losses"] != pytest.approx(full, rel=1e-6)
    assert np.abs(np.diff(full)).max() > 0.05 * full[0]


def test_rows_and_parameters_are_spread_as_the_mesh_says(runs):
    keys = ("slices", "batch_shards", "tokens", "table")
    found = {(name, mesh): [run[key] for key in keys] for name, meshes in runs.items() for mesh, run in meshes.items()}
    spread = {"one": [1, 1, 1, 1], "data": [1, 8, 8, 1], "fsdp": [1, 8, 8, 8], "cube": [1, 4, 4, 4]}
    spread["slices"] = [2, 8, 8, 2]
    assert found == {(name, mesh): spread[mesh] for name, meshes in RUNS.items() for mesh in ("one", *meshes)}
    assert (runs["lora"]["one"]["magnitude"], runs["lora"]["cube"]["magnitude"]) == (1, 2)


# ------------------------------------------------------------------------------------ the update itself, on a toy


def toy():
    params = {"backbone": {"text": {"norm": {"scale": np.float32([1, 2, 3])}}}, "head": {}}

    def loss(params, batch, progress):
        scale = params["backbone"]["text"]["norm"]["scale"]
        return jnp.sum(jnp.square(scale)) * batch["weight"], {"first": scale[0], "progress": progress}

    optimizer = optax.sgd(0.1, momentum=0.9)
    wanted = abstract_state(jax.eval_shape(lambda: params), optimizer, make_mesh(MeshConfig()))
    return make_step(loss, optimizer, wanted, steps=4), first_state(params, optimizer, wanted), wanted


def test_an_update_and_its_metrics():
    step, state, _ = toy()
    state, metrics = step(state, {"weight": jnp.float32(1)})
    np.testing.assert_allclose(state.params["backbone"]["text"]["norm"]["scale"], [0.8, 1.6, 2.4], rtol=1e-6)
    assert int(state.step) == 1
    assert metrics["loss"] == 14 and metrics["first"] == 1
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(4 * 14), rtol=1e-6)
    assert metrics["gradient_norm_text"] == metrics["gradient_norm"]
    assert metrics["progress"] == 0
    _, metrics = step(state, {"weight": jnp.float32(1)})
    assert metrics["progress"] == 0.25  # one of four steps is done


def test_the_state_is_donated_and_comes_out_where_it_went_in():
    step, before, wanted = toy()
    kept = jax.tree.leaves(before)
    after, _ = step(before, {"weight": jnp.float32(1)})
    assert all(leaf.is_deleted() for leaf in kept)
    for leaf, want in zip(jax.tree.leaves(after), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (want.shape, want.dtype, want.sharding)
    step(after, {"weight": jnp.float32(2)})
    assert step._cache_size() == 1  # one compilation for one shape
