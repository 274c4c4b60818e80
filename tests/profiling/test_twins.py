"""Equal code under several names: one dump serves all, and only those."""

from pathlib import Path

import pytest

from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.twins import Twins

TEXT = """HloModule twins

%inner (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%a), metadata={op_name="inner"}
}

%inner.2 (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} negate(%b)
}

%sub (x: f32[8], y: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %c = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner
  ROOT %s = f32[8]{0} subtract(%c, %y)
}

%sub.2 (x.2: f32[8], y.2: f32[8]) -> f32[8] {
  %y.2 = f32[8]{0} parameter(1)
  %x.2 = f32[8]{0} parameter(0)
  %c.2 = f32[8]{0} fusion(%x.2), kind=kLoop, calls=%inner.2
  ROOT %s.2 = f32[8]{0} subtract(%c.2, %y.2)
}

%turned (x.3: f32[8], y.3: f32[8]) -> f32[8] {
  %x.3 = f32[8]{0} parameter(0)
  %y.3 = f32[8]{0} parameter(1)
  %c.3 = f32[8]{0} fusion(%x.3), kind=kLoop, calls=%inner.2
  ROOT %s.3 = f32[8]{0} subtract(%y.3, %c.3)
}

ENTRY %main (p: f32[8], q: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %one = f32[8]{0} fusion(%p, %q), kind=kLoop, calls=%sub, metadata={op_name="layer0"}
  %two = f32[8]{0} fusion(%one, %q), kind=kLoop, calls=%sub.2, backend_config={"notes":{"n":"1"}}
  %placed = f32[8]{0:S(1)} fusion(%one, %q), kind=kLoop, calls=%sub.2
  %other = f32[8]{0} fusion(%two, %q), kind=kLoop, calls=%turned
  %kind = f32[8]{0} fusion(%two, %q), kind=kOutput, calls=%sub
  ROOT %sum = f32[8]{0} add(%other, %kind)
}
"""


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("one", "one.txt"),
        ("two", "one.txt"),  # the same body in another order, which calls another with other names
        ("placed", None),  # writes to another memory
        ("other", None),  # subtracts the other way round
        ("kind", None),
        ("sum", "sum.txt"),
    ],
)
def test_what_is_the_same_code_has_the_same_dump(name, found):
    module = Module(TEXT)
    twins = Twins(module, {"one": Path("one.txt"), "sum": Path("sum.txt")})
    op = next(op for op in module.computations["main"] if op.name == name)
    assert twins.dump("main", op) == (Path(found) if found else None)
