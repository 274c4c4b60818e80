"""A collective that goes on beside other work, as libtpu writes it: begun, carried through a loop, ended."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cocoa_jax.models.low_rank import LowRank
from cocoa_jax.profiling.collectives import collectives, ring_bytes
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.topology import slice_mesh, tpu_slice

PART, WHOLE, ROWS = "bf16[2,32]{1,0}", "bf16[8,32]{1,0}", "bf16[4,8]{1,0}"
GATHER = f"{WHOLE} all-gather(%part), channel_id=7, replica_groups=[1,4]<=[4], dimensions={{0}}"
STATE = f"({ROWS}, {PART}, {WHOLE}, s32[])"
TEXT = f"""HloModule async, is_scheduled=true

%begin (part: bf16[2,32]) -> (bf16[2,32], bf16[8,32]) {{
  %part = {PART} parameter(0)
  %gather.0 = {GATHER}
  ROOT %out.0 = ({PART}, {WHOLE}) tuple(%part, %gather.0)
}}

%async_collective_fusion.1 (part: bf16[2,32], whole: bf16[8,32], x: bf16[4,8], w: bf16[8,8]) -> (bf16[4,8], bf16[8,32]) {{
  %part = {PART} parameter(0)
  %whole = {WHOLE} parameter(1)
  %x.1 = {ROWS} parameter(2)
  %w.1 = bf16[8,8]{{1,0}} parameter(3)
  %product = {ROWS} convolution(%x.1, %w.1), dim_labels=bf_io->bf
  %gather.1 = {GATHER}
  ROOT %out.1 = ({ROWS}, {PART}, {WHOLE}, {WHOLE}) tuple(%product, %part, %whole, %gather.1)
}}

%finish (part: bf16[2,32], whole: bf16[8,32]) -> bf16[8,32] {{
  %part = {PART} parameter(0)
  %whole.2 = {WHOLE} parameter(1)
  ROOT %gather.2 = {GATHER}
}}

%body (carry: {STATE}) -> {STATE} {{
  %carry = {STATE} parameter(0)
  %x.2 = {ROWS} get-tuple-element(%carry), index=0
  %part.2 = {PART} get-tuple-element(%carry), index=1
  %whole.3 = {WHOLE} get-tuple-element(%carry), index=2
  %i = s32[] get-tuple-element(%carry), index=3
  %w.2 = bf16[8,8]{{1,0}} constant(0)
  %middle = ({ROWS}, {PART}, {WHOLE}, {WHOLE}) fusion(%part.2, %whole.3, %x.2, %w.2), kind=kOutput, output_to_operand_aliasing={{{{1}}: (0, {{}}), {{2}}: (1, {{}}), {{3}}: (1, {{}})}}, calls=%async_collective_fusion.1
  %y = {ROWS} get-tuple-element(%middle), index=0
  %part.3 = {PART} get-tuple-element(%middle), index=1
  %whole.4 = {WHOLE} get-tuple-element(%middle), index=3
  ROOT %turned = {STATE} tuple(%y, %part.3, %whole.4, %i)
}}

%condition (carry.1: {STATE}) -> pred[] {{
  %carry.1 = {STATE} parameter(0)
  ROOT %more = pred[] constant(true)
}}

ENTRY %main (x: bf16[4,8], part: bf16[2,32]) -> bf16[8,32] {{
  %x = {ROWS} parameter(0)
  %mine = {PART} parameter(1)
  %zero = s32[] constant(0)
  %async-collective-start.5 = ({PART}, {WHOLE}) fusion(%mine), kind=kCustom, output_to_operand_aliasing={{{{0}}: (0, {{}})}}, calls=%begin
  %part.5 = {PART} get-tuple-element(%async-collective-start.5), index=0
  %whole.5 = {WHOLE} get-tuple-element(%async-collective-start.5), index=1
  %state = {STATE} tuple(%x, %part.5, %whole.5, %zero)
  %loop = {STATE} while(%state), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  %part.6 = {PART} get-tuple-element(%loop), index=1
  %whole.6 = {WHOLE} get-tuple-element(%loop), index=2
  ROOT %async-collective-done.5 = {WHOLE} fusion(%part.6, %whole.6), kind=kCustom, output_to_operand_aliasing={{{{}}: (1, {{}})}}, calls=%finish
}}
"""  # noqa: E501


def test_it_runs_as_often_as_it_is_begun():
    (found,) = collectives(Module(TEXT), {"fsdp": 4})
    assert (found.kind, found.axis, found.runs) == ("all-gather", "fsdp", 1)
    assert found.wire == ring_bytes("all-gather", 2 * 8 * 32, 4)


@pytest.mark.parametrize(
    ("where", "name", "moved"),
    [
        ("main", "async-collective-start.5", 2 * (2 * 32 + 8 * 32)),  # reads its part, writes the whole
        ("body", "middle", 2 * (4 * 8 + 8 * 8 + 4 * 8)),  # its own product alone
        ("main", "async-collective-done.5", 0),
    ],
)
def test_its_result_is_written_once(where, name, moved):
    module = Module(TEXT)
    op = next(op for op in module.computations[where] if op.name == name)
    assert module.hbm_bytes(where, op) == moved
    assert op.starts == (name == "async-collective-start.5")


def test_an_adapter_is_gathered_and_not_sent_round_by_round():
    mesh = slice_mesh(tpu_slice("v5e:4x4"), {"data": 1, "fsdp": 16, "tensor": 1})

    def update(x, a, b):
        map_ = LowRank((), 1536, 256, rank=8, scale=1.0, dora=False, rate=0.0, weight_too=False)
        map_.a.set_value(a)
        map_.b.set_value(b)
        return map_(x, jnp.zeros((len(x), 256)), jnp.zeros((1536, 256)))

    def on_mesh(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows, split = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp")
    with jax.set_mesh(mesh):
        step = jax.jit(update).lower(
            on_mesh((16 * 2048, 1536), rows, jnp.bfloat16),
            on_mesh((1536, 8), split),
            on_mesh((8, 256), PartitionSpec()),
        )
        text = step.compile().as_text()
    assert "windowed_dot_general" not in text and " all-gather(" in text
