"""The image of all launchers, step by step without Docker: its files are there, and what they promise works."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "launch/Dockerfile").read_text()
STEPS = [line.split(maxsplit=1) for line in TEXT.replace("\\\n", " ").splitlines() if line and line[0] != "#"]


def setup_values() -> dict[str, ast.expr]:
    """The keywords of ``setup(...)``, by its source."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [one for one in calls if isinstance(one.func, ast.Name) and one.func.id == "setup"]
    return {word.arg: word.value for word in call.keywords if word.arg}


@pytest.fixture
def image(tmp_path) -> Path:
    """The working folder of the image after its COPY lines; commands that are linked lie in ``bin`` beside it."""
    root, commands = tmp_path / "cocoa", tmp_path / "bin"
    root.mkdir()
    commands.mkdir()
    for word, rest in STEPS:
        if word == "COPY":
            *sources, to = shlex.split(rest)
            for source in sources:
                path = REPOSITORY / source
                assert path.exists(), f"COPY {source}: there is no such file"
                place = root / to / path.name if to.endswith("/") else root / to
                place.parent.mkdir(parents=True, exist_ok=True)
                ignore = shutil.ignore_patterns("__pycache__", "data")
                shutil.copytree(path, place, ignore=ignore) if path.is_dir() else shutil.copy2(path, place)
        elif word == "RUN" and rest.startswith("ln -s "):
            _, _, of, name = shlex.split(rest)
            (commands / Path(name).name).symlink_to(root / Path(of).relative_to("/cocoa"))
    return root


def test_every_line_is_one_that_is_known():
    assert {word for word, _ in STEPS} <= {"FROM", "WORKDIR", "COPY", "RUN", "CMD"}
    assert STEPS[0][0] == "FROM" and ["WORKDIR", "/cocoa"] in STEPS


def test_its_extras_and_its_python_are_those_of_the_package():
    (line,) = [rest for word, rest in STEPS if word == "RUN" and "pip install" in rest]
    extras = re.search(r"'\.\[([\w,]+)\]'", line)[1].split(",")
    values = setup_values()
    assert set(extras) <= set(ast.literal_eval(values["extras_require"]))
    assert {"tpu", "gcs"} <= set(extras)  # chips, and the buckets that all launchers write to
    python = tuple(map(int, re.search(r"^python:(\d+)\.(\d+)", STEPS[0][1]).groups()))
    assert python >= tuple(map(int, re.findall(r"\d+", ast.literal_eval(values["python_requires"]))))


def test_the_package_can_be_built_of_the_files_that_are_copied(image):
    before = [rest.split()[0] for word, rest in STEPS[: [word for word, _ in STEPS].index("RUN")] if word == "COPY"]
    assert {"setup.py", "cocoa_jax", "configs"} <= set(before)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"], cwd=image, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    listed = (image / "cocoa_jax.egg-info/SOURCES.txt").read_text()
    assert "cocoa_jax/cli.py" in listed and "configs/demo/1-warmup.yaml" in listed


def test_the_stages_run_by_their_name_in_the_image(image):
    path = f"{image.parent / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split("cocoa-stages --base m --run gs://b/r --configs configs/demo --dry-run"),
        cwd=image,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    commands = done.stdout.splitlines()
    assert len(commands) == 3
    for line in commands:
        words = shlex.split(line)
        assert (image / words[words.index("--config") + 1]).is_file()  # it lies in the working folder


def test_people_are_told_to_build_it_as_it_says():
    told = re.search(r"^#   (docker build .*) \. &&", TEXT, re.M)[1]
    assert f"{told} .\n" in (REPOSITORY / "docs/training.md").read_text()
