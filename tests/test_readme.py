"""What the README and the docs show is run: Python as it stands, commands through the real parser."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cocoa_jax import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
# What stands behind a command in a line: a comment, or what the shell is to do besides.
BEHIND = re.compile(r"\s(#|&(?!&)|>).*$")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(path: Path) -> list[str]:
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", "").splitlines()]
    parts = [BEHIND.sub("", re.sub(r"\$\w+", "0", part).strip()) for line in lines for part in re.split("&&|;", line)]
    found = [part[part.index("cocoa ") :] for part in parts if re.match(r"(do )?(\w+=\S+ )?cocoa ", part)]
    # Stages that `cocoa run --write` makes first are read in tests/profiling/test_plan_commands.py.
    return sorted({one for one in found if "--config runs/" not in one})


def test_it_shows_every_command():
    assert {command.split()[1] for command in commands(README)} == set(cli.commands())


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_every_command_is_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = cli.build_parser(cli.commands(), "")
    for command in commands(path):
        assert parser.parse_args(shlex.split(command)[1:])["command"] == command.split()[1], command


def test_extras_are_those_of_the_package_in_the_clone():
    """The package is on no index: what is missing is installed from where it lies."""
    (line,) = re.findall(r"extras_require=(\{.*?\n    \})", (ROOT / "setup.py").read_text(), re.DOTALL)
    code = [*(ROOT / "cocoa_jax").rglob("*.py")]
    named = [re.findall(r"'\.\[([\w,]+)\]'", path.read_text()) for path in (README, *DOCS, *code)]
    assert {extra for found in named for some in found for extra in some.split(",")} <= set(ast.literal_eval(line))
    assert [path for path in code if "cocoa-jax[" in path.read_text()] == []


def test_its_python_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save("kiwi.png")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/3-contrastive").symlink_to(trained)
    names: dict[str, np.ndarray] = {}
    for block in blocks(README, "python"):
        exec(block, names)
    assert names["rows"].dtype == np.float32
    np.testing.assert_allclose(np.diag(names["similarity"]), 1, atol=1e-5)
    assert names["similarity"][0, 1] < 1 - 1e-6  # two things, two embeddings
