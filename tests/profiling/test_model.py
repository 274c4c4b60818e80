"""Which dump of bundles belongs to a kernel, and what bounds an operation and a program."""

from pathlib import Path

import pytest

from cocoa_jax.chips import CHIPS
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.model import ModelError, OpCost, ProgramCost, dump_of

TEXT = """HloModule two

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %span.1 = bf16[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %span.2 = bf16[8]{0:S(1)} custom-call(%span.1), custom_call_target="tpu_custom_call"
  %q = bf16[4]{0} slice(%span.2), slice={[0:4]}
  ROOT %span.3 = bf16[8]{0} custom-call(%q), custom_call_target="tpu_custom_call"
}
"""


def test_a_kernel_that_occurs_twice_has_one_dump():
    module, files = Module(TEXT), {"span.1": Path("one"), "other.9": Path("other")}
    ops = {op.name: op for op in module.computations["main"]}
    assert dump_of(module, "main", ops["span.1"], files) == dump_of(module, "main", ops["span.2"], files) == Path("one")
    with pytest.raises(ModelError, match=r"kernel span\.3 has no dump of bundles"):  # its operand has another shape
        dump_of(module, "main", ops["span.3"], files)


def test_an_operation_takes_as_long_as_its_tightest_bound():
    chip = CHIPS["v5e"]
    work = {"cycles": 1e-3 * chip.clock, "flops": 2e-3 * chip.peak_flops, "bytes": 4e-3 * chip.hbm_bandwidth}
    nothing = dict.fromkeys(work, 0.0)
    for bound, seconds in (("cycles", 5e-3), ("flops", 10e-3), ("bytes", 20e-3)):
        alone = OpCost("op", "", 5, **nothing | {bound: work[bound]}, parts=None)
        assert alone.seconds(chip) == pytest.approx(seconds)
    whole = OpCost("op", "", 5, **work, parts=None)
    assert whole.seconds(chip) == pytest.approx(20e-3) and whole.issue_seconds(chip) == pytest.approx(5e-3)
    # What moves beside the operations counts where it takes longer than they do together.
    program = ProgramCost(chip, (whole,), 10e-3 * chip.hbm_bandwidth, ())
    assert program.seconds == pytest.approx(30e-3)
