"""Which implementation runs: by name, or by platform and shape; and what is said about it."""

import logging

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from cocoa_jax.attention import api
from cocoa_jax.attention.spans import Spans


def arrays(length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    x = jax.ShapeDtypeStruct((1, length, 2, 8), np.float32)
    bound = jax.ShapeDtypeStruct((1, length), np.int32)
    return x, x, x, Spans(bound, bound)


def traced(length: int, implementation: str | None = None) -> str:
    def run(q, k, v, spans):
        return api.attend(q, k, v, spans, scale=1.0, implementation=implementation)

    return str(jax.make_jaxpr(run)(*arrays(length)))


def test_short_rows_are_dense_on_a_cpu_and_long_ones_are_not():
    assert "while" not in traced(64) and "while" in traced(1024)
    assert "while" in traced(64, "blockwise") and "while" not in traced(1024, "reference")


@pytest.mark.parametrize(
    ("platform", "length", "name"),
    [("cpu", 64, "reference"), ("cpu", 4096, "blockwise"), ("gpu", 64, "blockwise"), ("tpu", 64, "flash_tpu")],
)
def test_what_each_platform_takes(platform, length, name):
    assert api.choose(platform, length, length) == name


def test_the_mesh_in_use_decides_for_which_platform_a_program_is():
    assert api.platform() == "cpu"
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=chip)):
        assert api.platform() == "tpu"


def test_the_choice_is_logged_once_for_each_kind_of_row(caplog):
    with caplog.at_level(logging.INFO, logger="cocoa_jax.attention.api"):
        for length in (67, 67, 68):
            traced(length)
        traced(69, "reference")  # named: nothing was chosen
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"attention of {n} queries and {n} keys on cpu: reference" for n in (67, 68)]


def test_a_named_one_that_cannot_run_is_refused_and_nothing_else_takes_its_place():
    with pytest.raises(ValueError, match=r"'flash_tpu' runs on tpu, this program is for cpu: choose 'blockwise'"):
        traced(1024, "flash_tpu")
