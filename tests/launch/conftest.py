"""The launch scripts, run against commands that only write down how they were called."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "launch"


@dataclasses.dataclass
class Ended:
    """What a script left behind."""

    status: int
    output: str
    errors: str
    calls: list[list[str]]

    @property
    def lines(self) -> list[str]:
        """The commands it ran."""
        return [" ".join(call) for call in self.calls]


class Desk:
    """A PATH on which the cloud's commands are stand-ins."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        for name in ("gcloud", "kubectl", "xpk", "cocoa"):
            path = folder / name
            path.write_text(f"#!{sys.executable}\n" + (HERE / "stand_in.py").read_text())
            path.chmod(0o755)

    def start(
        self, script: str, *words: str, answers: Mapping[str, list] | None = None, poll: int = 0
    ) -> subprocess.Popen:
        """Begin a script in a session of its own, as a terminal has one, that looks every ``poll`` seconds."""
        (self.folder / "answers").write_text(json.dumps(answers or {}))
        (self.folder / "calls").write_text("")
        (self.folder / "seen").write_text("")
        (self.folder / "there").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "CALLS": str(self.folder / "calls"),
            "ANSWERS": str(self.folder / "answers"),
            "COCOA_POLL_SECONDS": str(poll),
        }
        command, pipe = [str(SCRIPTS / script), *words], subprocess.PIPE
        # bash cannot trap what is ignored when it starts, as a hangup is under nohup: tests may run there too
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
        process = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        for number, handler in before.items():
            signal.signal(number, handler)
        self.started.append(process)
        return process

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def run(self, script: str, *words: str, answers: Mapping[str, list] | None = None) -> Ended:
        process = self.start(script, *words, answers=answers)
        output, errors = process.communicate(timeout=60)
        return Ended(process.returncode, output, errors, self.calls())


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    for process in desk.started:  # a test that fails leaves nothing running either
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
