"""Signals: what was made is given back at once, whoever is told to stop, and however often."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_lines import ACTIVE, COMMAND, FREE, GKE, REQUEST, STAGES, XPK

SCRIPTS = Path(__file__).parents[2] / "launch"
UP = f"queued.sh up {REQUEST} {COMMAND}"
QUEUED, ON_GKE, ON_XPK = f"pipeline.sh queued {REQUEST}", f"pipeline.sh gke {GKE}", f"pipeline.sh xpk {XPK}"
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]


def until(desk, process, pattern):
    """Wait for a call that is made once there is something that costs money."""
    made = False
    while not made:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
        lines = [" ".join(call) for call in desk.calls()]
        first = next((index for index, line in enumerate(lines) if " create " in line), len(lines))
        made = any(re.search(pattern, line) for line in lines[first:])


def signalled(desk, line, answers, when, *signals, to=os.killpg):
    """Send ``signals`` one after the other, each when its call of ``when`` is under way; to the terminal's group."""
    process = desk.start(*shlex.split(line), answers=answers, poll=60)
    for pattern, number in zip(when, signals, strict=True):
        until(desk, process, pattern)
        time.sleep(0.2)
        to(process.pid, number)
    _, errors = process.communicate(timeout=40)
    return process.returncode, errors, ["delete" in call for call in desk.calls()]


MAKING = pytest.mark.parametrize(
    ("line", "answers"),
    [
        (UP, {**FREE, **ACTIVE}),
        (f"{QUEUED} {STAGES}", {**FREE, **ACTIVE}),
        (f"{ON_GKE} {STAGES}", {}),
        (f"{ON_XPK} {STAGES}", {}),
    ],
    ids=["up", "queued", "gke", "xpk"],
)


@MAKING
@pytest.mark.parametrize(("number", "status"), SIGNALS, ids=str)
@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["script", "terminal"])
def test_a_signal_while_it_is_being_made_gives_it_back(desk, line, answers, number, status, to):
    """The command that makes it goes on and succeeds; only then is there something to delete."""
    answers = {**answers, " create ": [[0, "sleep 1"]]}
    ended, errors, deleted = signalled(desk, line, answers, [" create "], number, to=to)
    assert ended == status and deleted[-1] and sum(deleted) == 1, errors
    lines = [" ".join(call) for call in desk.calls()]
    after = lines[[" create " in line for line in lines].index(True) + 1 :]
    assert all(" describe " in line or " delete " in line for line in after), after  # and nothing else is begun


@MAKING
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_being_made_needs_no_reader_to_be_given_back(desk, line, answers, number):
    """It would die of what it says where Ctrl-C has ended ``tee`` as well, or the terminal is closed."""
    process = desk.start(*shlex.split(line), answers={**answers, " create ": [[0, "sleep 1"]]}, poll=60)
    until(desk, process, " create ")
    process.stdout.close()
    process.stderr.close()
    os.killpg(process.pid, number)
    assert process.wait(40) in (129, 130)
    assert [call for call in desk.calls() if "delete" in call] == desk.calls()[-1:]


def test_what_is_being_made_is_told_of_as_it_goes_on(desk):
    script = 'case "$*" in *create*) echo asking; sleep 2; touch "$0.made";; *describe*) echo NOT_FOUND; exit 1;; esac'
    (desk.folder / "gcloud").write_text(f"#!/bin/sh\n{script}\n")
    process = desk.start(*shlex.split(UP))
    while "asking" not in (text := process.stderr.readline()):
        assert text, process.wait(40)
    assert not (desk.folder / "gcloud.made").exists()


WHILE = pytest.mark.parametrize(
    ("line", "answers", "when"),
    [
        (UP, {**FREE, "describe": [[0, "WAITING_FOR_RESOURCES"]]}, " describe "),
        (UP, {**FREE, **ACTIVE, "docker pull": [[0, "sleep 100"]]}, "docker pull"),
        (f"{QUEUED} {STAGES}", {**FREE, "describe": [[0, "WAITING_FOR_RESOURCES"]]}, " describe "),
        (f"{QUEUED} {STAGES}", {**FREE, **ACTIVE, "docker pull": [[0, "sleep 100"]]}, "docker pull"),
        (f"{QUEUED} {STAGES}", {**FREE, **ACTIVE, "inspect": [[0, "running:0"]]}, "inspect"),
        (f"{ON_GKE} {STAGES}", {}, "get jobset cocoa --output"),
        (f"{ON_XPK} {STAGES}", {"get jobset.*output=name": [[0, "jobset/cocoa"]]}, "get jobset cocoa --output"),
    ],
    ids=["up-wait", "up-setup", "wait", "setup", "finish", "gke", "xpk"],
)


@WHILE
@pytest.mark.parametrize(("number", "status"), SIGNALS, ids=str)
@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["script", "terminal"])
def test_a_signal_while_it_waits_gives_back_at_once(desk, line, answers, when, number, status, to):
    """Not when what it waits for has ended, perhaps days later."""
    ended, errors, deleted = signalled(desk, line, answers, [when], number, to=to)
    assert ended == status and deleted[-1] and sum(deleted) == 1, errors


@WHILE
def test_a_second_signal_does_not_keep_it_from_giving_back(desk, line, answers, when):
    answers = {" delete ": [[0, "sleep 1"]], **answers}
    ended, errors, deleted = signalled(desk, line, answers, [when, " delete "], signal.SIGINT, signal.SIGINT)
    assert ended == 130 and deleted[-1] and "!!!" not in errors, errors
    answers[" delete "] = [[1, "no rights"]]
    process = desk.start(*shlex.split(line), answers=answers)
    until(desk, process, when)
    for _ in range(20):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 130 and "MAY STILL BE RUNNING AND COST MONEY" in errors, errors


@WHILE
def test_a_reader_that_is_gone_does_not_keep_it_from_giving_back(desk, line, answers, when):
    """As when Ctrl-C ends ``tee`` as well, or the terminal is closed."""
    process = desk.start(*shlex.split(line), answers={" delete ": [[1, "no network"], [0, ""]], **answers})
    until(desk, process, when)
    process.stdout.close()
    process.stderr.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(40) in (130, 141) and sum("delete" in call for call in desk.calls()) == 2


ENDING = """
source "$1"
give_back() { echo "given back"; }
guard
made=1 command=0
another() { # a signal before the command that is so many of those that end the script
  [[ ${FUNCNAME[1]} == @(signalled|ended) ]] || return 0
  command=$((command + 1))
  [ "$command" -ne "$NTH" ] || kill -INT $$
}
set -o functrace
trap another DEBUG
[ "$FIRST" = none ] || kill -INT $$
exit 0
"""


@pytest.mark.parametrize("first", ["none", "signal"])
@pytest.mark.parametrize("nth", range(1, 12))
def test_a_signal_while_it_ends_does_not_keep_it_from_giving_back(first, nth):
    ended = subprocess.run(
        ["bash", "-c", ENDING, "bash", SCRIPTS / "lib.sh"],
        env={**os.environ, "NTH": str(nth), "FIRST": first},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert ended.stderr.count("given back") == 1, ended
    assert ended.returncode in (0, 130)
