"""Every `cocoa plan` that the documents show can be compiled: its slice exists, and its rows can be shared there."""

import re
import shlex
from pathlib import Path

import pytest

from cocoa_jax import cli
from cocoa_jax.commands import planning
from cocoa_jax.profiling.step_cost import check_step

REPOSITORY = Path(__file__).parents[2]
# In a block a command ends with its line, in a sentence with the backtick.
SHOWN = re.compile(r"^(cocoa plan (?:.*\\\n)*.*)$|`(cocoa plan [^`]+)`", re.MULTILINE)
WRITING = re.compile(r"^cocoa (run .* --write .*)$", re.MULTILINE)  # makes what some plans read
FILE = re.compile(r"^```yaml\n# (\w+\.yaml)(.*?)^```", re.MULTILINE | re.DOTALL)


def texts() -> list[str]:
    return [path.read_text() for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))]


def commands() -> list[str]:
    found = {block or inside for text in texts() for block, inside in SHOWN.findall(text)}
    return sorted(command.replace("\\\n", " ") for command in found)


def test_they_are_found():
    found = commands()
    assert len(found) >= 4 and any("--slices" in one and "shapes" in one for one in found)


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command.split()[2:8]))
def test_a_plan_that_is_shown_can_be_compiled(command, monkeypatch, tmp_path):
    asked = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for name, inside in (shown for text in texts() for shown in FILE.findall(text)):
        (tmp_path / name).write_text(f"# {inside}")
    for writing in (words for text in texts() for words in WRITING.findall(text)):
        cli.main(shlex.split(writing))
    for name in ("plan", "search"):
        monkeypatch.setattr(planning, name, lambda *given: asked.append(given) or "")
    cli.main(shlex.split(command)[1:])
    ((config, topology, slices, *_),) = asked
    check_step(config, topology, slices)
