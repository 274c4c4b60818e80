"""A pipeline through preemptions, hosts that are lost, networks that fail and others that use its name."""

import shlex

import pytest
from launch_lines import ACTIVE, FREE, GKE, REQUEST, STAGES, XPK

ENDED = {"get jobset": [[0, "Completed"]]}
FINISHED = {**ACTIVE, "inspect": [[0, "exited:0"]]}
CLUSTERS = pytest.mark.parametrize(("backend", "words"), [("gke", GKE), ("xpk", XPK)])


def pipeline(desk, answers, *more):
    words = shlex.split(f"queued {REQUEST} {STAGES}")
    ended = desk.run("pipeline.sh", *words, *more, answers={**FREE, **answers})
    return ended, [call[4] if call[4] != "ssh" else call[-1].removeprefix("--command=") for call in ended.calls]


def test_a_pipeline_that_is_preempted_asks_again_and_continues(desk):
    answers = {
        "inspect": [[255, ""], [0, "exited:0"]],
        "describe": [[0, "ACTIVE"], *[[0, "SUSPENDED"]] * 3, [0, "ACTIVE"]],
    }
    ended, done = pipeline(desk, answers)
    assert ended.status == 0, ended.errors
    starts = [line for line in done if "docker run" in line]
    assert len(starts) == 2 and starts[0] == starts[1]  # the same command picks up where it was
    assert [word for word in done if word in ("create", "delete")] == ["create", "delete", "create", "delete"]
    assert done[-1] == "delete" and "all stages are finished: gs://b/r" in ended.errors


def test_a_pipeline_whose_slices_are_still_there_starts_on_them(desk):
    answers = {"inspect": [[0, "exited:75"]] * 2 + [[0, "exited:0"]], **ACTIVE}
    ended, done = pipeline(desk, answers)
    assert ended.status == 0, ended.errors
    # What the first start said is told before its container goes.
    told = [next((word for word in ("docker logs", "docker run") if word in line), None) for line in done]
    assert [word for word in told if word] == ["docker run", "docker logs", "docker run"]
    assert sum("docker run" in line for line in done) == 2
    assert [word for word in done if word in ("create", "delete")] == ["create", "delete"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_slices_that_are_dead_are_replaced(desk, state):
    ended, done = pipeline(desk, {"taken": [[0, state]], **FINISHED})
    assert ended.status == 0, ended.errors
    assert done[:3] == ["describe", "delete", "create"] and done[3:].count("delete") == 1 and done[-1] == "delete"
    assert f"cocoa is {state}: it is made again" in ended.errors


UNSEEN = [[255, "no network"]] * 10
SEEN_AGAIN = {"worker=all.*inspect": [*UNSEEN, [0, "exited:0"]]}


@pytest.mark.parametrize("unread", [[1, "no network"], [0, "ACTIVE"]], ids=["no-network", "no-ssh"])
def test_a_run_outlives_what_cannot_be_seen(desk, unread):
    looks = {**SEEN_AGAIN, "worker=0.*inspect": [[0, "running:0"], *UNSEEN, [0, "exited:0"]]}
    ended, done = pipeline(desk, {**looks, "describe": [[0, "ACTIVE"], *[unread] * 10, [0, "ACTIVE"]]})
    assert ended.status == 0, ended.errors
    assert sum("docker pull" in line for line in done) == sum("docker run" in line for line in done) == 1
    assert [word for word in done if word in ("create", "delete")] == ["create", "delete"]
    assert ("could not be read 5 times; it MAY STILL BE RUNNING" in ended.errors) == (unread[0] == 1)
    assert ("no host of cocoa has answered 5 times" in ended.errors) == (unread[0] == 0)


@pytest.mark.parametrize(
    "answers",
    [
        {"taken": [[0, "ACTIVE\tme"]], "docker pull": [[255, "no network"]]},
        {"describe": [[0, "ACTIVE"]], "docker run": [[255, "no network"]]},
    ],
    ids=["taken-up", "start-unheard"],
)
def test_what_may_run_is_waited_for_where_it_cannot_be_seen(desk, answers):
    looks = {**SEEN_AGAIN, "worker=0.*inspect": [*UNSEEN, [0, "running:0"], [0, "exited:0"]]}
    ended, done = pipeline(desk, {**looks, **answers}, "--owner", "me")
    assert ended.status == 0, ended.errors
    assert sum("docker run" in line for line in done) == ("docker run" in answers)
    assert [word for word in done if word == "delete"] == ["delete"]


MINE, THEIRS = [0, "ACTIVE\tme"], [0, "ACTIVE\tyou"]


@pytest.mark.parametrize(
    ("inspect", "describe"),
    [
        ([[255, ""], [0, "exited:0"]], [MINE, [0, "WAITING_FOR_RESOURCES\tyou"], THEIRS]),
        ([[255, ""], [0, "exited:0"]], [MINE, *[[0, "WAITING_FOR_RESOURCES\t"]] * 2, [0, "ACTIVE\t"]]),
        ([[255, ""], [0, "exited:0"]], [MINE, [0, "SUSPENDED\tme"], THEIRS]),
        ([[0, "running:0"], [0, "exited:0"]], [MINE, THEIRS]),
        ([[0, "running:0"], [0, "exited:75"]], [MINE, THEIRS]),
    ],
    ids=["seen-waiting", "seen-waiting-without-labels", "seen-active", "followed-to-the-end", "followed-to-a-restart"],
)
def test_slices_that_are_another_pipelines_by_now_are_left_alone(desk, inspect, describe):
    """It has replaced those that were taken away from this one."""
    answers = {"worker=0.*inspect": inspect, "inspect": inspect[-1:], "describe": describe}
    ended, done = pipeline(desk, answers, "--owner", "me")
    assert ended.status == 2 and "left alone" in ended.errors, ended.errors
    assert sum("docker run" in line for line in done) == 1
    assert [word for word in done if word in ("create", "delete")] == ["create"]


def test_a_request_that_was_heard_although_it_failed_is_gone_on_with(desk):
    waiting = [0, "WAITING_FOR_RESOURCES\tme"]
    taken = {"taken": [[1, "NOT_FOUND"], waiting, waiting, MINE], "create": [[1, "no network"]]}
    ended, done = pipeline(desk, {**taken, "inspect": [[0, "exited:0"]]}, "--owner", "me")
    assert ended.status == 0, ended.errors
    assert [word for word in done if word in ("create", "delete")] == ["create", "delete"]


def test_a_pipeline_that_was_killed_is_taken_up_again_by_its_owner(desk):
    answers = {"taken": [MINE], "docker ps": [[0, "runs"]], "inspect": [[0, "exited:0"]]}
    ended, done = pipeline(desk, answers, "--owner", "me")
    assert ended.status == 0 and not any("docker run" in line for line in done), ended.errors
    assert [word for word in done if word in ("create", "delete")] == ["delete"]


def test_slices_that_somebody_has_deleted_are_not_asked_for_again(desk):
    gone = {"inspect": [[255, ""]], "describe": [[0, "ACTIVE"], [1, "NOT_FOUND"]]}
    ended, done = pipeline(desk, gone)
    assert ended.status == 2 and "there is no queued resource cocoa" in ended.errors
    assert done.count("create") == 1


def test_a_host_that_is_started_anew_is_started_on(desk):
    ended, done = pipeline(desk, {**FINISHED, "inspect": [[0, "exited:255"]] * 2 + [[0, "exited:0"]]})
    assert ended.status == 0 and sum("docker run" in line for line in done) == 2, ended.errors
    assert [word for word in done if word in ("create", "delete")] == ["create", "delete"]


def test_a_pipeline_stops_at_an_error_that_stays_and_gives_back(desk):
    last = {"docker logs": [[0, "mixture.yaml cannot be read"]]}
    ended, done = pipeline(desk, {**ACTIVE, "inspect": [[0, "exited:1"]], **last})
    assert ended.status == 1 and done[-1] == "delete" and sum("docker run" in line for line in done) == 1
    assert "the stages have failed with status 1" in ended.errors
    assert "mixture.yaml cannot be read" in ended.output
    assert "docker logs" in [word for word in done if word != "describe"][-2]
    ended, done = pipeline(desk, {**ACTIVE, "inspect": [[0, "exited:1"]], "docker logs": [[255, ""]]})
    assert ended.status == 1 and done[-1] == "delete" and "could not be read" in ended.errors
    ended, done = pipeline(desk, {**ACTIVE, "inspect": [[0, "exited:1"]]}, "--keep")
    assert "delete" not in done and "ARE LEFT RUNNING AND COST MONEY (--keep)" in ended.errors


CONTEXT = {"get-contexts": [[0, "gke_p_z_k"]]}
BACKENDS = pytest.mark.parametrize(
    ("words", "answers"),
    [
        pytest.param(f"queued {REQUEST}", {**FREE, **FINISHED}, id="queued"),
        pytest.param(f"gke {GKE}", {"ignore-not-found": [[0, ""]], **ENDED}, id="gke"),
        pytest.param(f"xpk {XPK}", {"get jobset.*output=name": [[0, "jobset/cocoa"]], **CONTEXT, **ENDED}, id="xpk"),
    ],
)


@BACKENDS
def test_deleting_that_fails_once_is_tried_again(desk, words, answers):
    words = shlex.split(f"{words} {STAGES} --keep")  # after a failure, which this is none
    ended = desk.run("pipeline.sh", *words, answers={" delete ": [[1, "no network"], [0, ""]], **answers})
    assert ended.status == 0 and "!!!" not in ended.errors
    assert sum("delete" in call for call in ended.calls) == 2


@BACKENDS
def test_what_cannot_be_deleted_is_no_success(desk, words, answers):
    ended = desk.run("pipeline.sh", *shlex.split(f"{words} {STAGES}"), answers={" delete ": [[1, "no"]], **answers})
    assert ended.status == 1 and sum("delete" in call for call in ended.calls) == 10
    assert "!!! pipeline.sh: the slices MAY STILL BE RUNNING AND COST MONEY" in ended.errors


@BACKENDS
def test_deleting_that_was_heard_although_it_failed_is_done(desk, words, answers):
    gone = {"describe": [*[[0, "ACTIVE"]] * 3, [1, "NOT_FOUND"]], "get jobset.*output=name": [[0, ""]]}
    answers = {" delete ": [[1, "no network"], [1, "NotFound"]], **gone, **answers, **gone}
    if "gke" in words:
        answers[" delete "] = [[1, "no network"], [0, ""]]  # it is told to ignore what is not found
    ended = desk.run("pipeline.sh", *shlex.split(f"{words} {STAGES}"), answers=answers)
    assert ended.status == 0 and "!!!" not in ended.errors


TAKEN_ONCE = {"describe": [[0, "ACTIVE"], *[[0, "SUSPENDED"]] * 2, [0, "ACTIVE"]]}


@pytest.mark.parametrize(
    "answers",
    [
        {"docker pull": [[1, "worker 3: connection closed"], [0, "one host"]], **TAKEN_ONCE},
        {"docker run": [[255, ""], [0, "one host"]], **TAKEN_ONCE},
        {"describe": [[0, "WAITING_FOR_RESOURCES"], *[[0, "SUSPENDED"]] * 2, [0, "ACTIVE"]]},
    ],
    ids=["pull", "start", "wait"],
)
def test_slices_that_are_taken_away_before_the_stages_run_are_asked_for_again(desk, answers):
    ended, done = pipeline(desk, {**answers, "inspect": [[0, "exited:0"]]})
    assert ended.status == 0, ended.errors
    assert [word for word in done if word in ("create", "delete")] == ["create", "delete", "create", "delete"]


def test_slices_that_are_still_there_are_kept_when_something_on_them_fails(desk):
    ended, done = pipeline(desk, {**FINISHED, "docker pull": [[1, "connection closed"], [0, "one host"]]})
    assert ended.status == 0 and sum("docker run" in line for line in done) == 1, ended.errors
    assert [word for word in done if word in ("create", "delete")] == ["create", "delete"]


def test_slices_that_are_taken_away_before_the_stages_run_again_are_asked_for_again(desk):
    answers = {
        "docker run": [[0, "one host"], [255, ""], [0, "one host"]],
        "inspect": [[0, "exited:75"]] * 2 + [[0, "exited:0"]],
        "describe": [*[[0, "ACTIVE"]] * 3, *[[0, "SUSPENDED"]] * 2, [0, "ACTIVE"]],
    }
    ended, done = pipeline(desk, answers)
    assert ended.status == 0, ended.errors
    assert sum("docker run" in line for line in done) == 3
    assert [word for word in done if word in ("create", "delete")] == ["create", "delete", "create", "delete"]


def test_a_pipeline_whose_stages_never_start_gives_up(desk):
    ended, done = pipeline(desk, {**ACTIVE, "docker pull": [[1, "no such image"]]})
    assert ended.status == 1 and done.count("create") == 1 and done[-1] == "delete"
    assert sum("docker pull" in line for line in done) == 5
    assert "the stages could not be started 5 times in a row" in ended.errors
    full = {"docker pull": [[0, "one host"], [1, "no space left"]], "inspect": [[0, "exited:75"]]}
    ended, done = pipeline(desk, {**ACTIVE, **full})
    assert ended.status == 1 and done.count("create") == 1 and done[-1] == "delete"
    assert sum("docker pull" in line for line in done) == 1 + 5


@pytest.mark.parametrize(
    ("answers", "status", "last"),
    [
        ({"create": [[2, "wrong value"]]}, 2, "create"),
        ({"describe": [[0, "FAILED"]]}, 3, "delete"),  # as when --valid-until has passed
    ],
)
def test_a_request_that_stays_wrong_is_made_once(desk, answers, status, last):
    ended, done = pipeline(desk, answers)
    assert ended.status == status and done.count("create") == 1 and done[-1] == last


def test_a_pipeline_gives_up_after_its_attempts(desk):
    ended, done = pipeline(desk, {**ACTIVE, "inspect": [[0, "exited:75"]]}, "--attempts", "3")
    assert ended.status == 75 and sum("docker run" in line for line in done) == 3 and done[-1] == "delete"


@CLUSTERS
@pytest.mark.parametrize("failing", [False, True])
def test_a_pipeline_on_a_cluster_leaves_nothing(desk, backend, words, failing):
    looks = [[0, ""], [0, "Failed" if failing else "Completed"]]
    answers = {"ignore-not-found": [[0, ""]], "get jobset cocoa ": looks}
    ended = desk.run("pipeline.sh", *shlex.split(f"{backend} {words} {STAGES}"), answers=answers)
    assert (ended.status != 0) == failing, ended.errors
    assert "delete" in ended.calls[-1]
    assert ("logs" in ended.calls[-2]) == failing


@CLUSTERS
def test_a_run_on_a_cluster_outlives_what_cannot_be_seen(desk, backend, words):
    looks = [[0, ""], *[[1, "connection refused"]] * 6, [0, "Completed"]]
    answers = {"ignore-not-found": [[0, ""]], "get jobset cocoa ": looks}
    ended = desk.run("pipeline.sh", *shlex.split(f"{backend} {words} {STAGES}"), answers=answers)
    assert ended.status == 0, ended.errors
    assert ["delete" in call for call in ended.calls] == [False] * (len(ended.calls) - 1) + [True]
    assert ended.errors.count("could not be read 5 times; it MAY STILL BE RUNNING AND COST MONEY") == 1


@CLUSTERS
def test_kubectl_needs_no_context(desk, backend, words):
    """Inside a cluster it has none."""
    answers = {"ignore-not-found": [[0, ""]], "current-context": [[1, "error: current-context is not set"]], **ENDED}
    ended = desk.run("pipeline.sh", *shlex.split(f"{backend} {words} {STAGES}"), answers=answers)
    assert ended.status == 0 and "--context" not in "".join(ended.lines), ended.errors


@CLUSTERS
def test_a_run_on_a_cluster_that_somebody_has_deleted_has_ended(desk, backend, words):
    gone = [1, 'Error from server (NotFound): jobsets.jobset.x-k8s.io "cocoa" not found']
    answers = {"ignore-not-found": [[0, ""]], "get jobset cocoa ": [[0, ""], gone]}
    ended = desk.run("pipeline.sh", *shlex.split(f"{backend} {words} {STAGES}"), answers=answers)
    assert ended.status == 1 and "there is no JobSet cocoa (any more)" in ended.errors


def seen_in(ended):
    """The contexts that kubectl was called with, which may be none."""
    calls = [call for call in ended.calls if call[0] == "kubectl" and call[1] != "config"]
    return {word for call in calls for word in [next((word for word in call if "--context" in word), None)]}


@pytest.mark.parametrize("context", ["mine", "the big one"])
def test_kubectl_may_be_pointed_elsewhere_while_a_jobset_is_made_or_runs(desk, context):
    answers = {"ignore-not-found": [[0, ""]], "current-context": [[0, context], [0, "elsewhere"]], **ENDED}
    ended = desk.run("pipeline.sh", *shlex.split(f"gke {GKE} {STAGES}"), answers=answers)
    assert ended.status == 0 and seen_in(ended) == {f"--context={context}"}, ended.errors


@pytest.mark.parametrize(
    ("contexts", "taken"),
    [
        ("gke_p_z_other gke_q_z_k gke_p_z2_k gke_p_us-central1_k mine", "--context=gke_p_us-central1_k"),
        ("gke_p_us-central1-a_k gke_p_us-central1-a_kk", "--context=gke_p_us-central1-a_k"),
        ("mine", None),
    ],
    ids=["region", "zone", "none"],
)
def test_what_another_xpk_has_pointed_kubectl_at_is_not_looked_at(desk, contexts, taken):
    answers = {"current-context": [[0, "gke_p_z_other"]], "get-contexts": [[0, contexts.replace(" ", "\n")]], **ENDED}
    words = XPK.replace("--zone z", "--zone us-central1-a")
    ended = desk.run("pipeline.sh", *shlex.split(f"xpk {words} {STAGES}"), answers=answers)
    assert ended.status == 0 and seen_in(ended) == {taken}, ended.errors
    ended = desk.run("pipeline.sh", *shlex.split(f"xpk {words} {STAGES} --context its"), answers=answers)
    assert ended.status == 0 and seen_in(ended) == {"--context=its"}, ended.errors


@CLUSTERS
def test_a_run_that_another_cluster_lacks_goes_on(desk, backend, words):
    gone = [1, 'Error from server (NotFound): jobsets.jobset.x-k8s.io "cocoa" not found']
    for looks, status in [([gone, [0, ""], [0, "Completed"]], 0), ([gone] * 5 + [[0, "Completed"]], 1)]:
        answers = {"ignore-not-found": [[0, ""]], "get jobset cocoa --output": looks}
        ended = desk.run("pipeline.sh", *shlex.split(f"{backend} {words} {STAGES}"), answers=answers)
        assert ended.status == status, ended.errors


@CLUSTERS
@pytest.mark.parametrize("failing", ["ignore-not-found|filter-by-job", "create"])
def test_a_cluster_is_cleaned_of_nothing_that_was_not_submitted(desk, backend, words, failing):
    ended = desk.run("pipeline.sh", *shlex.split(f"{backend} {words} {STAGES}"), answers={failing: [[1, "no"]]})
    assert ended.status == 1 and not any("delete" in call for call in ended.calls)
    assert any("create" in call for call in ended.calls) == (failing == "create")
