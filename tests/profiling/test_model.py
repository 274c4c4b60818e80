"""Which dump of bundles belongs to a kernel."""

from pathlib import Path

import pytest

from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.model import ModelError, dump_of

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
