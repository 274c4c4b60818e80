"""The JobSet is what its controller accepts, and says what the documentation of GKE asks of TPU jobs."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE / "jobset.schema.json").read_text())
CASES = ["gke-submit", "gke-submit-slices", "gke-submit-one-chip", "pipeline-gke"]


def rendered(case: str) -> dict:
    text = (HERE / "golden" / f"{case}.txt").read_text()
    return yaml.safe_load("\n".join(line for line in text.splitlines() if not line.startswith("kubectl ")))


@pytest.mark.parametrize("case", CASES)
def test_against_the_schema(case):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(rendered(case), SCHEMA)


def job_of(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    return job


def volume(spec: dict, name: str) -> dict:
    (one,) = [one for one in spec["volumes"] if one["name"] == name]
    return one


@pytest.mark.parametrize(
    ("case", "slices", "hosts", "chips"),
    [
        ("gke-submit", 1, 4, 4),  # 4x4: 16 chips
        ("gke-submit-slices", 2, 64, 4),  # 16x16: 256 chips
        ("gke-submit-one-chip", 1, 1, 1),
        ("pipeline-gke", 1, 4, 4),  # 2x2x4: 16 chips
    ],
)
def test_pods_and_chips(case, slices, hosts, chips):
    jobset = rendered(case)
    job = job_of(jobset)
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"]) == (slices, hosts, hosts)
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    annotations = jobset["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"
    assert container["command"][:3] == ["cocoa-stages", "--base", container["command"][2]]


def test_options_reach_the_pods():
    pod = job_of(rendered("gke-submit-slices"))["template"]["spec"]["template"]
    spec = pod["spec"]
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    assert spec["serviceAccountName"] == "trainer" and spec["terminationGracePeriodSeconds"] == 300
    assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    attributes = volume(spec, "data")["csi"]["volumeAttributes"]
    assert attributes == {"bucketName": "bucket", "mountOptions": "implicit-dirs,only-dir=some/data"}
    one = job_of(rendered("gke-submit-one-chip"))["template"]["spec"]["template"]["spec"]
    assert one["nodeSelector"]["cloud.google.com/reservation-name"] == "mine" and "tolerations" not in one
    attributes = volume(one, "data")["csi"]["volumeAttributes"]
    assert attributes == {"bucketName": "bucket", "mountOptions": "implicit-dirs"}
    plain = job_of(rendered("gke-submit"))["template"]["spec"]["template"]
    assert [one["name"] for one in plain["spec"]["volumes"]] == ["shared-memory"]
    assert "gke-gcsfuse/volumes" not in plain["metadata"]["annotations"]


@pytest.mark.parametrize("case", CASES)
def test_workers_have_shared_memory(case):
    """They hand over whole batches of 170 MB and more, and a container has 64 MB by itself."""
    spec = job_of(rendered(case))["template"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert volume(spec, "shared-memory")["emptyDir"] == {"medium": "Memory"}


def test_workers_on_queued_resources_have_shared_memory(tmp_path):
    """Half of what the host has, as a tmpfs has by itself: a batch of stage 3 may be 22 GB (docs/data.md)."""
    start = shlex.split((HERE / "golden/queued-start.txt").read_text().splitlines()[-1])
    (tmp_path / "sudo").write_text('#!/bin/sh\ncase "$*" in *run*) printf "%s\\n" "$@";; esac\n')
    (tmp_path / "curl").write_text("#!/bin/sh\n")
    for name in ("sudo", "curl"):
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["sh", "-c", start[-1].removeprefix("--command=")]
    words = subprocess.check_output(command, env={"PATH": path}, text=True).splitlines()
    total = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]
    assert words[words.index("--shm-size") + 1] == f"{int(total) // 2}k"


def test_a_command_arrives_as_it_was_given(desk):
    words = ["cocoa-stages", "--base", '/data/a "quoted" \\ name', "--run", "gs://b/r", "it's: #1 {NAME} &amp; $x"]
    line = "render --name cocoa --type v5e --topology 2x2 --image r/p/i:1 --"
    ended = desk.run("gke.sh", *shlex.split(line), *words)
    assert ended.status == 0, ended.errors
    pod = job_of(yaml.safe_load(ended.output))["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == words


@pytest.mark.parametrize(
    "harm",
    [
        lambda jobset: jobset["spec"].update(backoffLimit=0),
        lambda jobset: jobset["spec"]["failurePolicy"].update(maxRestarts="5"),
        lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
        lambda jobset: job_of(jobset).pop("name"),
        lambda jobset: job_of(jobset)["template"]["spec"].update(completionMode="indexed"),
        lambda jobset: job_of(jobset)["template"]["spec"]["template"]["spec"].update(restartPolicy="Always"),
        lambda jobset: job_of(jobset)["template"]["spec"]["template"]["spec"]["nodeSelector"].update(spot=True),
    ],
)
def test_the_schema_sees_mistakes(harm):
    jobset = rendered("gke-submit")
    harm(jobset)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, SCHEMA)
