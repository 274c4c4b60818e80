"""What the README shows is run: its Python as it stands, its commands through the real parser."""

import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cocoa_jax import cli

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("cocoa ")]


def test_it_shows_every_command():
    assert {command.split()[1] for command in commands()} == set(cli.commands())


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_accepted(command, monkeypatch):
    monkeypatch.chdir(README.parent)
    parser = cli.build_parser(cli.commands(), "")
    assert parser.parse_args(shlex.split(command)[1:])["command"] == command.split()[1]


def test_its_python_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save("kiwi.png")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/3-contrastive").symlink_to(trained)
    names: dict[str, np.ndarray] = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["rows"].dtype == np.float32
    np.testing.assert_allclose(np.diag(names["similarity"]), 1, atol=1e-5)
    assert names["similarity"][0, 1] < 1 - 1e-6  # two things, two embeddings
