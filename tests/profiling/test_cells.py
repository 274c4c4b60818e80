"""Which code a kept measurement depends on."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from cocoa_jax.profiling import cells as cells_module


def test_every_file_that_a_cell_depends_on_exists():
    for patterns in cells_module._READ.values():
        for pattern in patterns:
            assert list(cells_module._PACKAGE.glob(pattern)), pattern


def imported(path: Path) -> Iterator[Path]:
    """Modules of the package that one imports."""
    package = cells_module._PACKAGE
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cocoa_jax."):
            base = package.joinpath(*node.module.split(".")[1:])
            places = [base.with_suffix(".py"), *(base / f"{name.name}.py" for name in node.names)]
            yield from (place for place in places if place.is_file())


@pytest.mark.parametrize(("program", "module"), [("plan", "plan"), ("step", "step_cost")])
def test_a_train_step_is_made_again_when_code_changes_that_it_is_compiled_from(program, module):
    package = cells_module._PACKAGE
    found, left = set[Path](), [package / f"profiling/{module}.py"]
    while left:
        if (path := left.pop()) not in found:
            found.add(path)
            left += imported(path)
    compiled = ("attention", "models", "objectives", "training", "profiling")
    parts = {path for path in found if path.parent.name in compiled}
    outside = {package / "training" / "place.py"}  # no part of a compiled step
    read = {path for pattern in cells_module._READ[program] for path in package.glob(pattern)}
    assert outside < parts and parts - outside <= read, parts - outside - read


def test_words_about_code_make_no_cell_again():
    code = '"""A module."""\nimport a\n\ndef f(x):\n    """Says."""\n    return x + 1  # why\n'
    other = '"""Another."""\nfrom b import a\ndef f(x):\n    return (x + 1)\n'
    assert cells_module._computed(code) == cells_module._computed(other)
    assert cells_module._computed(code) != cells_module._computed(code.replace("+ 1", "+ 2"))


@pytest.mark.parametrize("kept", [True, False])
def test_nothing_is_measured_twice(tmp_path, monkeypatch, kept):
    """In one command without a folder, in all that name one."""
    made = []
    monkeypatch.setattr(cells_module, "_measure", lambda spec: made.append(dict(spec)) or {"of": spec["stage"]})
    folder, spec = tmp_path if kept else None, {"program": "plan", "topology": "v5e:4x4"}
    cells = cells_module.Cells(folder)
    for stage in ("bridge", "warmup", "bridge"):
        assert cells.get({**spec, "stage": stage}) == {"of": stage}
    assert [one["stage"] for one in made] == ["bridge", "warmup"]
    assert cells_module.Cells(folder).get({**spec, "stage": "bridge"}) == {"of": "bridge"}
    assert len(made) == (2 if kept else 3)
