"""The exact command lines, against golden files; every flag of theirs is one that public documentation lists."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "launch"
FLAGS = json.loads((SCRIPTS / "flags.json").read_text())

AT = "--name cocoa --project my-project --zone us-central1-a"
IMAGE = "--image us-docker.pkg.dev/my-project/repo/cocoa:1"
COMMAND = "-- cocoa-stages --base '/data/my model' --run gs://bucket/run"
V5E = "--runtime v2-alpha-tpuv5-lite"
STAGES = "--base /data/Qwen2-VL-2B-Instruct --run gs://bucket/run --configs /data/configs"
XPK = f"{AT} --cluster my-cluster"

CASES = {
    "queued-create": f"queued.sh create {AT} --accelerator v5litepod-16 {V5E}",
    "queued-create-spot": (
        f"queued.sh create {AT} --type v4 --topology 2x2x4 --runtime tpu-ubuntu2204-base --spot --valid-until 6h"
    ),
    "queued-create-slices": (
        f"queued.sh create {AT} --accelerator v5litepod-256 {V5E} --slices 2 --reserved --service-account a@b.c"
    ),
    "queued-wait": f"queued.sh wait {AT}",
    "queued-setup": f"queued.sh setup {AT} {IMAGE} --data gs://bucket/data",
    "queued-start": f"queued.sh start {AT} {IMAGE} --grace 300 {COMMAND}",
    "queued-up": (
        f"queued.sh up {AT} --owner me --accelerator v5litepod-16 {V5E} {IMAGE} --data gs://bucket/data {COMMAND}"
    ),
    "queued-log": f"queued.sh log {AT}",
    "queued-tail": f"queued.sh tail {AT}",
    "queued-finish": f"queued.sh finish {AT}",
    "queued-stop": f"queued.sh stop {AT}",
    "queued-delete": f"queued.sh delete {AT}",
    "gke-submit": f"gke.sh submit --name cocoa --type v5e --topology 4x4 {IMAGE} {COMMAND}",
    "gke-submit-slices": (
        f"gke.sh submit --name cocoa --namespace ml --type v6e --topology 16x16 --slices 2 --spot {IMAGE} "
        f"--data gs://bucket/some/data --service-account trainer --max-restarts 5 --grace 300 {COMMAND}"
    ),
    "gke-submit-one-chip": (
        f"gke.sh submit --name cocoa --type v5e --topology 1x1 --reservation mine {IMAGE} --data gs://bucket {COMMAND}"
    ),
    "gke-log": "gke.sh log --name cocoa",
    "gke-tail": "gke.sh tail --name cocoa --namespace ml",
    "gke-finish": "gke.sh finish --name cocoa --context my-context",
    "gke-stop": "gke.sh stop --name cocoa --namespace ml",
    "gke-delete": "gke.sh delete --name cocoa",
    "xpk-submit": f"xpk.sh submit {XPK} --tpu-type v5litepod-16 {IMAGE} {COMMAND}",
    "xpk-submit-slices": (
        f"xpk.sh submit {XPK} --tpu-type v6e-256 --slices 2 --spot {IMAGE} --priority high --max-restarts 5 {COMMAND}"
    ),
    "xpk-submit-reservation": f"xpk.sh submit {XPK} --tpu-type v5p-128 --reservation mine {IMAGE} {COMMAND}",
    "xpk-finish": f"xpk.sh finish {XPK}",
    "xpk-log": f"xpk.sh log {XPK}",
    "xpk-tail": f"xpk.sh tail {XPK}",
    "xpk-stop": f"xpk.sh stop {XPK}",
    "xpk-delete": f"xpk.sh delete {XPK}",
    "stages": "stages.sh --base /data/model --run gs://bucket/run --configs /data/configs/",
    "stages-two": (
        "stages.sh --base m --run out --configs configs/pods --stages 1-warmup-lora,3-contrastive-lora "
        "-- --loop.steps=3 --mesh.fsdp=4"
    ),
    "pipeline-queued": f"pipeline.sh queued {AT} --owner me --accelerator v5litepod-16 {V5E} --spot {IMAGE} {STAGES}",
    "pipeline-queued-slices": (
        f"pipeline.sh queued {AT} --owner me --accelerator v5litepod-256 {V5E} --slices 2 --reserved {IMAGE} {STAGES}"
    ),
    "pipeline-gke": f"pipeline.sh gke --name cocoa --type v5p --topology 2x2x4 {IMAGE} {STAGES} -- --mesh.fsdp=16",
    "pipeline-xpk": f"pipeline.sh xpk {XPK} --tpu-type v5litepod-64 {IMAGE} {STAGES}",
}


@pytest.mark.parametrize("case", CASES)
def test_command_lines(desk, case):
    """`--dry-run` prints them and runs nothing."""
    script, *words = shlex.split(CASES[case])
    at = words.index("--") if "--" in words else len(words)
    ended = desk.run(script, *words[:at], "--dry-run", *words[at:])
    assert ended.status == 0, ended.errors
    assert ended.calls == []
    golden = HERE / "golden" / f"{case}.txt"
    assert ended.output == golden.read_text()
    for line in ended.output.splitlines():
        if line.startswith(("gcloud ", "kubectl ", "xpk ")):
            check_flags(shlex.split(line))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("stages", "pipeline"))])
def test_what_is_run_is_what_was_printed(desk, case):
    script, *words = shlex.split(CASES[case])
    answers = {
        "ignore-not-found": [[0, ""]],
        "describe": [[0, "ACTIVE"]],
        "inspect": [[0, "exited:0"]],
        "get jobset": [[0, "Completed"]],
        "get-contexts": [[0, "elsewhere\ngke_my-project_us-central1-a_my-cluster"]],
    }
    if case.startswith(("queued-create", "queued-up")):
        answers["taken"] = [[1, "NOT_FOUND"]]
    ended = desk.run(script, *words, answers=answers)
    assert ended.status == 0, ended.errors
    printed = (HERE / "golden" / f"{case}.txt").read_text().splitlines()
    assert ended.calls == [shlex.split(line) for line in printed if line.startswith(("gcloud ", "kubectl ", "xpk "))]


def metadata(folder: Path, endpoints: str, environment: str) -> str:
    """A PATH on which a host's metadata are those, and nothing is run as root."""
    answers = {"worker-network-endpoints": endpoints, "tpu-env": environment}
    (folder / "curl").write_text('#!/bin/sh\ncat "$0.${3##*/}"\n')  # -sfH HEADER URL
    (folder / "sudo").write_text("#!/bin/sh\n")
    for name, text in answers.items():
        (folder / f"curl.{name}").write_text(text)
    for name in ("curl", "sudo"):
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("endpoints", "environment", "told"),
    [
        ("unknown:unknown:10.0.0.2", "ACCELERATOR_TYPE: 'v5litepod-4'\n", "1"),
        ("h0,h1,h2,h3", "MEGASCALE_COORDINATOR_ADDRESS: 'h0'\nMEGASCALE_NUM_SLICES: '2'\nWORKER_ID: '0'\n", "4 2"),
    ],
)
def test_a_host_tells_how_many_there_are(tmp_path, endpoints, environment, told):
    words = shlex.split((HERE / "golden/queued-stop.txt").read_text())
    command = words[-1].removeprefix("--command=")
    path = metadata(tmp_path, endpoints, environment)
    ended = subprocess.run(["sh", "-c", command], env={"PATH": path}, capture_output=True, text=True)
    assert ended.stdout.strip() == f"cocoa:done {told}", ended.stderr


def check_flags(words: list[str]) -> None:
    """Every flag of a command is in the table of that command."""
    commands = [name for name in FLAGS if " " in name]
    known = next((name for name in commands if words[: len(name.split())] == name.split()), None)
    assert known is not None, f"flags.json says nothing about {words[:5]}"
    for word in words[len(known.split()) :]:
        if word.startswith("-"):
            flag = word.split("=")[0]
            everywhere = FLAGS.get(words[0], {"flags": []})["flags"]
            assert flag in FLAGS[known]["flags"] + everywhere, (known, flag)


@pytest.mark.parametrize(
    "line",
    [
        "gcloud compute tpus queued-resources create x --reservation=y",
        "gcloud compute tpus queued-resources delete x --spot",
        "kubectl create --image=x",
        "xpk workload create --node-count=2",
        "xpk workload create --restart-on-user-code-failure",
        "gcloud compute tpus locations list",
    ],
)
def test_unknown_flags_fail(line):
    with pytest.raises(AssertionError):
        check_flags(shlex.split(line))


@pytest.mark.parametrize("script", ["queued.sh", "gke.sh", "xpk.sh", "pipeline.sh", "stages.sh"])
def test_help_names_every_option_and_every_verb(desk, script):
    ended = desk.run(script, "--help")
    assert ended.status == 0 and ended.calls == [] and ended.errors == ""
    text = (SCRIPTS / script).read_text()
    for option in re.findall(r"^ +(--[a-z-]+)(?: \| --[a-z-]+)*\)", text, flags=re.MULTILINE):
        assert option in ended.output, option
    for verb in re.findall(
        r"^  ((?:\w+ \| )+\w+)\)", text[text.rindex("case $verb") :] if "$verb" in text else "", re.M
    ):
        for name in verb.split(" | "):
            assert re.search(rf"^  {name}\b", ended.output, re.M), name


def test_scripts_are_clean():
    scripts = sorted(str(path) for path in SCRIPTS.glob("*.sh"))
    checked = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path", str(SCRIPTS.parent), *scripts],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for path in map(Path, scripts):
        if path.name not in ("lib.sh", "jobset.sh"):
            assert "\nset -euo pipefail\n" in path.read_text() and path.stat().st_mode & 0o111
