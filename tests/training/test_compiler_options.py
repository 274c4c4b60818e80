"""What the compiler of TPUs is told: that it does something, and that every program over shared parameters says it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cocoa_jax import embedder
from cocoa_jax.profiling.topology import slice_mesh, tpu_slice
from cocoa_jax.training import step
from cocoa_jax.training.mesh import MeshConfig, compiler_options, make_mesh
from cocoa_jax.training.state import abstract_state

UNKNOWN = {"no_option_of_any_compiler": True}


def test_a_shared_weight_is_gathered_whole_on_tpus():
    mesh = slice_mesh(tpu_slice("v5e:2x4", 1), {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1})
    shared = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((8 * 1024, 1024), jnp.bfloat16, sharding=shared)
    weight = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=shared)

    def sent(options):
        product = jax.jit(lambda x, w: x @ w.astype(x.dtype), out_shardings=shared, compiler_options=options)
        text = product.lower(x, weight).compile().as_text()
        return {
            kind for kind in ("all-gather", "collective-permute") if f" {kind}(" in text or f" {kind}-start(" in text
        }

    assert sent(compiler_options(mesh)) == {"all-gather"}
    # Once the compiler does so by itself, the option can go.
    assert sent(None) == {"collective-permute"}


def test_other_devices_are_told_nothing():
    assert compiler_options(make_mesh(MeshConfig())) is None


def test_a_train_step_passes_them_on(monkeypatch):
    monkeypatch.setattr(step, "compiler_options", lambda mesh: UNKNOWN)
    params = {"backbone": {"text": {"norm": {"scale": np.float32([1, 2, 3])}}}, "head": {}}
    wanted = abstract_state(jax.eval_shape(lambda: params), optax.sgd(0.1), make_mesh(MeshConfig()))
    made = step.make_step(lambda params, batch, progress: (batch["x"], {}), optax.sgd(0.1), wanted, steps=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_option_of_any_compiler"):
        made.lower(wanted, {"x": jnp.float32(0)}).compile()


def test_an_embedder_passes_them_on(trained, monkeypatch):
    monkeypatch.setattr(embedder, "compiler_options", lambda mesh: UNKNOWN)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_option_of_any_compiler"):
        embedder.Embedder.load(trained).embed([{"text": "a kiwi"}])
