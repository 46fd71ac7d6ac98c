"""User actions: rejected ones, concurrent ones, and changes of a job."""

from typing import Any

import pytest

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness, in_threads
from trainyard.contract.lr_schedule import LRSchedule, lr_at
from trainyard.contract.status import JobStatus, Reason
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.jobs import actions, repository


def test_a_refusal_says_the_status_and_what_fits(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    refused = any_rig.post_action(job_id, "resume", status=409)
    assert refused["code"] == "invalid_state"
    assert refused["job_status"] == "running"
    assert refused["allowed_actions"] == ["pause", "save", "cancel", "kill"]
    assert refused["detail"] == "The job is running. Allowed actions: pause, save, cancel, kill."
    any_rig.exit(attempt, "completed", step=10)
    for verb in ("pause", "cancel", "kill", "resume"):
        assert any_rig.post_action(job_id, verb, status=409)["allowed_actions"] == ["delete"]


def test_pausing_cannot_be_resumed_until_it_has_stopped(rig: ServiceHarness) -> None:
    job_id, _ = rig.running()
    rig.post_action(job_id, "pause")
    assert "wait until it has stopped" in rig.post_action(job_id, "resume", status=409)["detail"]


def test_allowed_actions_say_why_not(rig: ServiceHarness) -> None:
    job = rig.job(rig.submit())
    assert {a["action"]: a["why_not"] for a in job["allowed_actions"]} == {
        "pause": None,
        "resume": "the job is queued",
        "save": "the job is queued",
        "fork": "there is no checkpoint to fork",
        "cancel": None,
        "kill": None,
        "delete": "the job is queued: cancel it first",
    }


@pytest.mark.parametrize("verb", ["pause", "resume", "save", "cancel", "kill"])
def test_no_such_job(rig: ServiceHarness, verb: str) -> None:
    for job_id in ("job_aaaaaaaaaa", "nonsense", "job_", "JOB_A", "%2e%2e%2fetc", "job_a%00", "x" * 5000):
        assert rig.client.post(f"/jobs/{job_id}/{verb}").status_code == 404, job_id


@pytest.mark.parametrize("verb", ["pause", "save", "cancel", "kill", "resume"])
def test_bodies_are_read_strictly(rig: ServiceHarness, verb: str) -> None:
    job_id, _ = rig.running()
    refused = rig.post_action(job_id, verb, {"gently": True}, status=422)
    there = (
        "those here are epochs, max_steps, max_tokens, max_minutes, target_loss, save_dir, gradient_checkpointing, "
        "resources, step, schedule"
        if verb == "resume"
        else "there are none here"
    )
    assert refused["errors"] == [{"pointer": "/gently", "message": f"is not a field; {there}"}]
    assert rig.status(job_id) is JobStatus.RUNNING
    rig.post_action(job_id, verb, [1], status=422)


def paused(rig: ServiceHarness, **groups: Any) -> str:
    job_id, attempt = rig.running(**groups)
    rig.checkpoint(job_id, attempt, 5)
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", Reason.USER, step=5)
    return job_id


def test_resume_changes_what_it_may(any_rig: ServiceHarness) -> None:
    job_id = paused(any_rig)
    body = {"epochs": 4, "max_steps": 500, "resources": {"nproc_per_node": 2, "priority": 7}, "step": 5}
    job = any_rig.post_action(job_id, "resume", body)
    assert (job["spec"]["training"]["epochs"], job["spec"]["training"]["max_steps"]) == (4, 500)
    assert job["spec"]["resources"]["nproc_per_node"] == 2
    assert job["spec"]["resources"]["max_restarts"] == 3, "what is not named stays"
    any_rig.reconcile()
    launch = any_rig.launcher.of(job_id, 2).launch
    assert launch.devices == ("cpu:0", "cpu:1")
    assert launch.spec.training.max_steps == 500
    asked = next(e for e in any_rig.data(job_id, "events") if e["data"].get("changes"))
    assert asked["data"]["changes"] == [
        "/resources/nproc_per_node",
        "/resources/priority",
        "/training/epochs",
        "/training/max_steps",
    ]


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({"epochs": 1, "max_steps": 3}, ["/epochs", "/max_steps"]),
        ({"epochs": None}, ["/epochs"]),
        ({"epochs": "x"}, ["/epochs"]),
        ({"epochs": 2**60}, ["/epochs"]),
        ({"max_steps": 10.5}, ["/max_steps"]),
        ({"resources": 5}, ["/resources"]),
        ({"resources": {"nproc_per_node": 9}}, ["/resources/nproc_per_node"]),
        ({"resources": {"nprocs": 1}}, ["/resources/nprocs"]),
        ({"schedule": "jump"}, ["/schedule"]),
        ({"step": "x"}, ["/step"]),
        ({"step": True}, ["/step"]),
        ({"step": -1}, ["/step"]),
        ({"step": 2**63}, ["/step"]),
        ({"learning_rate": 1}, ["/learning_rate"]),
        ({"learning_rate": 1, "step": -1}, ["/learning_rate", "/step"]),
        ({"max_steps": 3, "resources": {"nproc_per_node": 9}}, ["/max_steps", "/resources/nproc_per_node"]),
    ],
)
def test_resume_refuses_what_it_may_not(rig: ServiceHarness, body: dict[str, Any], pointers: list[str]) -> None:
    job_id = paused(rig, training={"epochs": 2, "max_steps": 10})
    refused = rig.post_action(job_id, "resume", body, status=422)
    assert [e["pointer"] for e in refused["errors"]] == pointers
    assert rig.status(job_id) is JobStatus.PAUSED


def test_more_tokens_are_more_steps(any_rig: ServiceHarness) -> None:
    """A given length replaces the other one; the old end is what the worker has counted, and the rest is estimated."""
    job_id = paused(any_rig, training={"max_tokens": 1000, "learning_rate": 0.01})
    plan = any_rig.job(job_id)["plan"]
    assert (plan["steps"], plan["tokens_per_step"]) == (10, 100)
    fewer = any_rig.post_action(job_id, "resume", {"max_tokens": 999}, status=422)["errors"]
    assert fewer == [{"pointer": "/max_tokens", "message": "may only be raised: it is 1,000"}]
    both = any_rig.post_action(job_id, "resume", {"max_tokens": 1100, "max_steps": 20}, status=422)["errors"]
    assert [error["pointer"] for error in both] == ["/max_tokens"]
    job = any_rig.post_action(job_id, "resume", {"max_tokens": 1600})
    assert (job["spec"]["training"]["max_tokens"], job["plan"]["steps"]) == (1600, 16)
    assert job["learning_rate_before"] == pytest.approx(lr_at(5, 10, 0.01), rel=0, abs=1e-12)
    assert job["learning_rate_after"] == pytest.approx(lr_at(6, 16, 0.01), rel=0, abs=1e-12)
    any_rig.post_action(job_id, "pause")
    job = any_rig.post_action(job_id, "resume", {"max_steps": 20})
    assert (job["spec"]["training"]["max_tokens"], job["plan"]["steps"]) == (None, 20)


def test_a_finished_run_needs_more_tokens(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running(training={"max_tokens": 1000})
    rig.checkpoint(job_id, attempt, 10)
    rig.exit(attempt, "completed", None, step=10)
    assert [e["pointer"] for e in rig.post_action(job_id, "resume", {"max_tokens": 1000}, status=422)["errors"]] == [
        "/max_tokens"
    ]
    assert rig.post_action(job_id, "resume", {"max_tokens": 1001})["plan"]["steps"] == 11


def ended_at_limit(rig: ServiceHarness, seconds: float, **limits: float) -> str:
    job_id, attempt = rig.running(limits=limits)
    attempt.metric(5, train_seconds=seconds - 1)
    rig.checkpoint(job_id, attempt, 5)
    attempt.say("finished", outcome="completed", step=5, reason="limit", message="enough", train_seconds=seconds)
    rig.exit(attempt, "completed", Reason.LIMIT, step=5)
    return job_id


def test_a_run_at_its_limit_has_succeeded_and_continues_with_more(any_rig: ServiceHarness) -> None:
    job_id = ended_at_limit(any_rig, 60.5, max_minutes=1)
    job = any_rig.job(job_id)
    assert (job["status"], job["reason"], job["resumable"]) == ("succeeded", "limit", False)
    assert "max_minutes" in job["resume_blocker"]
    assert job["limits_left"] == {"seconds": 0.0, "tokens": None}
    assert job["progress"]["train_seconds"] == 60.5
    assert [point["train_seconds"] for point in any_rig.data(job_id, "metrics")] == [59.5]
    for body in ({"max_minutes": 1.0}, {"max_steps": 1000}, {"target_loss": 2}):
        errors = any_rig.post_action(job_id, "resume", body, status=422)["errors"]
        assert [error["pointer"] for error in errors] == ["/max_minutes"]
        assert "1.008 minutes of training are used up" in errors[0]["message"]
    assert any_rig.post_action(job_id, "resume", {}, status=409)["code"] == "invalid_state"
    job = any_rig.post_action(job_id, "resume", {"max_minutes": 3})
    assert (job["status"], job["spec"]["limits"]["max_minutes"]) == ("queued", 3.0)
    assert job["limits_left"]["seconds"] == pytest.approx(119.5)
    any_rig.post_action(job_id, "pause")
    assert any_rig.post_action(job_id, "resume", {"max_minutes": None})["limits_left"] is None


def test_a_run_at_its_target_continues_with_a_lower_one(rig: ServiceHarness) -> None:
    job_id = ended_at_limit(rig, 30, max_minutes=1, target_loss=3)
    errors = rig.post_action(job_id, "resume", {"max_minutes": 5}, status=422)["errors"]
    assert errors == [{"pointer": "/target_loss", "message": "must be less than 3, which is reached, or null"}]
    assert rig.post_action(job_id, "resume", {"target_loss": 2.5})["spec"]["limits"]["target_loss"] == 2.5


def test_a_target_that_was_removed_after_the_end_may_be_set_again(rig: ServiceHarness) -> None:
    job_id = ended_at_limit(rig, 30, target_loss=3)
    assert rig.client.patch(f"/jobs/{job_id}", json={"target_loss": None}).status_code == 200
    assert rig.post_action(job_id, "resume", {"target_loss": 2})["spec"]["limits"]["target_loss"] == 2


def test_a_limit_that_the_stored_spec_does_not_have(rig: ServiceHarness) -> None:
    job_id = ended_at_limit(rig, 30)
    with rig.database.write() as session:
        job = repository.find(session, job_id)
        job.spec = {name: group for name, group in job.spec.items() if name != "limits"}  # one of 0.1
    assert rig.post_action(job_id, "resume", {"target_loss": 2})["spec"]["limits"]["target_loss"] == 2


def test_what_is_left_counts_over_attempts_and_after_a_kill(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running(limits={"max_minutes": 2}, training={"max_tokens": 900})
    assert rig.job(job_id)["limits_left"] == {"seconds": 120.0, "tokens": 900}
    attempt.metric(4, train_seconds=20)
    rig.ship(attempt)
    assert rig.job(job_id)["limits_left"] == {"seconds": 100.0, "tokens": 500}
    report = attempt.end("crashed", Reason.WORKER_CRASHED, step=6).model_copy(update={"train_seconds": 31.5})
    assert rig.report(attempt, "exit", report.model_dump(mode="json")).status_code == 200
    assert rig.job(job_id)["limits_left"]["seconds"] == pytest.approx(88.5)


LONGER = [({"max_steps": 40}, 40), ({"epochs": 3}, 30)]


@pytest.mark.parametrize(("more", "steps"), LONGER)
def test_a_longer_run_says_its_rate_before_and_after(any_rig: ServiceHarness, more: dict[str, int], steps: int) -> None:
    job_id = paused(any_rig, training={"learning_rate": 0.01})
    job = any_rig.post_action(job_id, "resume", more)
    expected = [pytest.approx(lr_at(5, 10, 0.01)), pytest.approx(lr_at(6, steps, 0.01))]
    event = any_rig.data(job_id, "events")[-1]
    for answer in (job, job["plan"], event["data"]):
        assert [answer["learning_rate_before"], answer["learning_rate_after"]] == expected
    assert event["message"].endswith(
        f"; the learning rate is {lr_at(5, 10, 0.01):.3g} before and {lr_at(6, steps, 0.01):.3g} after"
    )
    assert job["plan"]["steps"] == steps
    assert job["spec"]["training"]["continued_at"] == []


@pytest.mark.parametrize(("more", "steps"), LONGER)
def test_a_longer_run_may_decay_on_from_its_present_rate(
    any_rig: ServiceHarness, more: dict[str, int], steps: int
) -> None:
    job_id = paused(any_rig, training={"learning_rate": 0.01})
    job = any_rig.post_action(job_id, "resume", {**more, "schedule": "continue"})
    schedule = LRSchedule(0.01, 0.1, steps, continued_at=((5, 10),))
    assert job["learning_rate_before"] == pytest.approx(lr_at(5, 10, 0.01))
    assert job["learning_rate_after"] == pytest.approx(schedule.at(6))
    assert 0.98 * job["learning_rate_before"] < job["learning_rate_after"] < job["learning_rate_before"]
    attempt = any_rig.next_attempt(job_id, 2, start_step=5, steps=steps)
    assert attempt.launch.spec.training.continued_at == [(5, 10)]
    for step in (6, 15):
        attempt.metric(step)
    any_rig.checkpoint(job_id, attempt, 15)
    any_rig.post_action(job_id, "pause")
    any_rig.exit(attempt, "stopped", Reason.USER, step=15)
    again = any_rig.post_action(job_id, "resume")
    assert again["spec"]["training"]["continued_at"] == [[5, 10]], "a resume without more steps keeps the schedule"
    assert again["learning_rate_after"] == pytest.approx(schedule.at(16))
    assert "learning rate" not in any_rig.data(job_id, "events")[-1]["message"]


def test_without_a_checkpoint_there_is_no_rate_before(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    rig.exit(attempt, "failed", Reason.DATA_INVALID)
    job = rig.post_action(job_id, "resume", {"epochs": 2, "schedule": "continue"})
    assert (job["learning_rate_before"], job["learning_rate_after"]) == (None, None)
    assert job["spec"]["training"]["continued_at"] == []


def saved_at(rig: ServiceHarness, *steps: int) -> str:
    """A paused job with these checkpoints and a point of the curve at every step."""
    job_id, attempt = rig.running()
    for step in range(1, max(steps) + 1):
        attempt.metric(step)
    for step in steps:
        rig.checkpoint(job_id, attempt, step)
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", Reason.USER, step=max(steps))
    return job_id


def test_resume_from_a_named_step(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id = saved_at(rig, 3, 5, 8)
    asked = rig.post_action(job_id, "resume", {"step": 5})
    assert asked["status"] == "queued"
    message = [event["message"] for event in rig.data(job_id, "events") if event["data"].get("to") == "queued"][-1]
    assert message == "asked to resume; goes back to step 5; newer checkpoints are set aside"
    rig.reconcile()
    attempt = rig.launcher.of(job_id, 2)
    assert attempt.launch.resume_step == 5
    gone = rig.home / "runs" / job_id / "checkpoints" / "step-00000008"
    attempt.say("checkpoint_removed", step=8, path=str(gone), why="superseded")
    attempt.started(start_step=5)
    attempt.metric(6, loss=0.5)
    rig.ship(attempt)
    assert [(m["step"], m["attempt"]) for m in rig.data(job_id, "metrics")] == [
        *((step, 1) for step in range(1, 6)),
        (6, 2),
    ]
    assert [c["step"] for c in rig.data(job_id, "checkpoints")] == [5, 3]
    rig.exit(attempt, "crashed", Reason.WORKER_CRASHED, step=6)
    rig.clock.forward(60)
    rig.reconcile()
    assert rig.launcher.of(job_id, 3).launch.resume_step is None


def test_an_attempt_that_never_began_leaves_the_named_step_to_the_next(rig: ServiceHarness) -> None:
    job_id = saved_at(rig, 3, 5)
    rig.post_action(job_id, "resume", {"step": 3})
    rig.reconcile()
    rig.exit(rig.launcher.of(job_id, 2), "crashed", Reason.WORKER_CRASHED)
    rig.clock.forward(60)
    rig.reconcile()
    assert rig.launcher.of(job_id, 3).launch.resume_step == 3
    rig.post_action(job_id, "pause")
    rig.exit(rig.launcher.of(job_id, 3), "stopped", Reason.USER)
    rig.post_action(job_id, "resume")
    rig.reconcile()
    assert rig.launcher.of(job_id, 4).launch.resume_step is None, "a later wish is the one that counts"


def test_a_step_without_a_full_checkpoint_cannot_be_gone_on_from(rig: ServiceHarness) -> None:
    job_id = saved_at(rig, 3, 5)
    assert rig.post_action(job_id, "resume", {"step": 4}, status=409)["code"] == "step_unavailable"
    assert rig.post_action(job_id, "resume", {"step": 0}, status=409)["code"] == "step_unavailable"
    (rig.home / "runs" / job_id / "checkpoints" / "step-00000003").rmdir()
    assert rig.post_action(job_id, "resume", {"step": 3}, status=409)["code"] == "step_unavailable"
    assert rig.status(job_id) is JobStatus.PAUSED
    assert rig.post_action(job_id, "resume", {"step": 5})["status"] == "queued"


def test_save_now(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    for _ in range(2):
        assert rig.post_action(job_id, "save")["status"] == "running"
    assert (attempt.save_asked, attempt.stop_asked) == (2, 0)
    asked = [(e["kind"], e["actor"], e["message"]) for e in rig.data(job_id, "events") if e["kind"] == "save"]
    assert asked == [("save", "local", "asked to save")] * 2
    rig.post_action(job_id, "pause")
    refused = rig.post_action(job_id, "save", status=409)
    assert (refused["code"], refused["job_status"]) == ("invalid_state", "pausing")
    rig.exit(attempt, "stopped", Reason.USER, step=1)
    assert rig.post_action(job_id, "save", status=409)["allowed_actions"] == ["resume", "cancel", "kill"]
    assert attempt.save_asked == 2


def test_resume_where_the_corpus_is_gone(rig: ServiceHarness) -> None:
    job_id = paused(rig)
    rig.corpus.unlink()
    refused = rig.post_action(job_id, "resume", status=422)
    assert refused["errors"] == [{"pointer": "/data/data_path", "message": "does not exist or cannot be reached"}]


def test_resume_with_changes_while_it_is_being_resumed(rig: ServiceHarness) -> None:
    job_id = paused(rig)
    rig.post_action(job_id, "resume")
    rig.post_action(job_id, "resume")
    assert rig.post_action(job_id, "resume", {"epochs": 9}, status=409)["code"] == "invalid_state"


@pytest.mark.parametrize(
    "changes",
    [
        {"discarded": True},
        {"labels": {"a": "b"}, "description": "kept", "group": "old", "name": "again"},
        {"priority": 7, "keep_last": 2, "save_interval": 9, "log_interval": 4, "max_minutes": 5.0, "target_loss": 1.5},
    ],
)
def test_patch_of_a_job_whose_corpus_and_device_are_gone(
    make_rig: MakeHarness, any_url: str, changes: dict[str, Any]
) -> None:
    """For example, the corpus was moved after the run. The job can still be described, labelled and discarded."""
    rig = make_rig(any_url, devices=(Device("cuda:0", "cuda"), *cpu_slots(1)))
    job_id = rig.submit(resources={"device": "cuda:0"}, training={"recipe": "fast"})
    before = rig.job(job_id)["spec"]
    rig.corpus.unlink()
    rig.devices = cpu_slots(1)
    rig = rig.restart()
    answer = rig.client.patch(f"/jobs/{job_id}", json=changes)
    assert answer.status_code == 200, answer.text
    changed = actions.differences(before, answer.json()["spec"])
    assert sorted(pointer.rpartition("/")[2] for pointer in changed if "labels" not in pointer) == sorted(
        changes.keys() - {"labels", "discarded"}
    )
    wrong = rig.client.patch(f"/jobs/{job_id}", json={"keep_last": 0})
    assert [error["pointer"] for error in wrong.json()["errors"]] == ["/keep_last"]


def test_patch(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id = rig.submit(labels={"a": "1"})
    body = {
        "name": "renamed",
        "labels": {"b": "2"},
        "priority": 5,
        "log_interval": 7,
        "save_interval": 8,
        "keep_last": 9,
    }
    answer = rig.client.patch(f"/jobs/{job_id}", json=body)
    assert answer.status_code == 200
    job = answer.json()
    assert (job["name"], job["labels"]) == ("renamed", {"b": "2"})
    assert (job["spec"]["name"], job["spec"]["labels"]) == ("renamed", {"b": "2"})
    assert job["spec"]["resources"]["priority"] == 5
    assert job["spec"]["reporting"]["log_interval"] == 7
    assert (job["spec"]["checkpoint"]["save_interval"], job["spec"]["checkpoint"]["keep_last"]) == (8, 9)
    assert [j["id"] for j in rig.get("/jobs", label="b=2")["data"]] == [job_id]
    assert rig.get("/jobs", label="a=1")["data"] == []
    rig.reconcile()
    assert rig.client.patch(f"/jobs/{job_id}", json={"name": "again"}).json()["name"] == "again"


def in_every_status(rig: ServiceHarness) -> dict[str, str]:
    """A job in each status in which a job can rest or wait, none of them leased anything that another needs."""
    found: dict[str, str] = {}
    for outcome, reason, verb in (
        ("completed", None, None), ("failed", Reason.DIVERGED, None), ("stopped", None, "pause"),
        ("stopped", None, "cancel"), ("crashed", Reason.WORKER_CRASHED, None),
    ):  # fmt: skip
        job_id, attempt = rig.running()
        if verb:
            rig.post_action(job_id, verb)
            found[rig.status(job_id)] = job_id
        rig.exit(attempt, outcome, reason, step=5)
        found[rig.status(job_id)] = job_id
    running, _ = rig.running()
    starting = rig.submit()
    rig.reconcile()
    queued = rig.submit()
    return {**found, "running": running, "starting": starting, "queued": queued}


def test_resumable_is_what_a_resume_says_on_every_job(any_rig: ServiceHarness) -> None:
    jobs = in_every_status(any_rig)
    statuses = {status: any_rig.job(job_id) for status, job_id in jobs.items()}
    seen = {job["status"] for job in statuses.values()}
    assert seen == {"succeeded", "failed", "paused", "cancelled", "interrupted", "running", "starting", "queued"}
    for job in statuses.values():
        assert job["resumable"] == (job["resume_blocker"] is None)
        answer = any_rig.client.post(f"/jobs/{job['id']}/resume")
        assert (answer.status_code == 202) == job["resumable"], (job["status"], answer.text)
        if not job["resumable"]:
            assert job["resume_blocker"].lower()[:20] in answer.json()["detail"].lower()


def test_settings_of_a_live_run_go_to_its_agent_with_every_answer(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running(reporting={"log_interval": 5})
    spec = any_rig.job(job_id)["spec"]
    before = {"log_interval": 5, **{name: spec["checkpoint"][name] for name in ("save_interval", "keep_last")}}
    before |= {"max_minutes": None, "target_loss": None}
    assert any_rig.heartbeat(attempt, 1)["settings"] == before
    answer = any_rig.client.patch(f"/jobs/{job_id}", json={"log_interval": 2, "keep_last": 4, "max_minutes": 2.5})
    assert (answer.status_code, answer.json()["spec"]["reporting"]["log_interval"]) == (200, 2)
    after = {**before, "log_interval": 2, "keep_last": 4, "max_minutes": 2.5}
    assert any_rig.heartbeat(attempt, 2)["settings"] == after
    attempt.say("settings", step=7, message="log_interval is 2 and was 5", **after)
    assert any_rig.ship(attempt)["settings"] == after
    told = {event["kind"]: event for event in any_rig.data(job_id, "events")}
    assert (
        told["changed"]["message"]
        == "changed keep_last, log_interval, max_minutes; the run receives it with its next report"
    )
    assert told["settings"]["message"] == "from step 8 on: log_interval is 2 and was 5"
    assert told["settings"]["data"] == {"step": 7, **after}
    # The next attempt begins with them.
    any_rig.exit(attempt, "stopped", step=7)
    any_rig.post_action(job_id, "resume")
    any_rig.reconcile()
    assert any_rig.launcher.of(job_id, 2).launch.spec.reporting.log_interval == 2


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"name": ""}, "/name"),
        ({"name": "a\nb"}, "/name"),
        ({"name": "x" * 10_000}, "/name"),
        ({"labels": {"a": 1}}, "/labels/a"),
        ({"priority": "high"}, "/priority"),
        ({"priority": 2**70}, "/priority"),
        ({"keep_last": 0}, "/keep_last"),
        ({"status": "succeeded"}, "/status"),
        ([], ""),
    ],
)
def test_patch_refuses(rig: ServiceHarness, body: Any, pointer: str) -> None:
    answer = rig.client.patch(f"/jobs/{rig.submit()}", json=body)
    assert answer.status_code == 422, answer.text
    assert pointer in [e["pointer"] for e in answer.json()["errors"]]


def test_priority_decides_who_is_next(rig: ServiceHarness) -> None:
    rig.running(resources={"nproc_per_node": 2})
    first, second = rig.submit(), rig.submit()
    assert [rig.job(j)["queue"]["position"] for j in (first, second)] == [1, 2]
    rig.client.patch(f"/jobs/{second}", json={"priority": 1})
    assert [rig.job(j)["queue"]["position"] for j in (first, second)] == [2, 1]


def test_many_at_once_have_one_winner(any_rig: ServiceHarness) -> None:
    """Pause, cancel and kill from many threads: one truth, and an event log that is a path of the table."""
    job_id, attempt = any_rig.running()
    verbs = ["pause", "cancel", "kill"] * 4

    def act(index: int) -> int:
        return int(any_rig.client.post(f"/jobs/{job_id}/{verbs[index]}").status_code)

    answers = in_threads(len(verbs), act)
    assert set(answers) <= {202, 409}
    assert any_rig.status(job_id) is JobStatus.CANCELLING
    assert any_rig.job(job_id)["desired"] == "kill"
    any_rig.exit(attempt, "killed", Reason.USER, step=1)
    assert any_rig.status(job_id) is JobStatus.CANCELLED


def test_finish_against_cancel(any_rig: ServiceHarness) -> None:
    for _ in range(5):
        job_id, attempt = any_rig.running()
        report = attempt.end("completed", step=10).model_dump(mode="json")

        def race(index: int, job_id: str = job_id, attempt: Any = attempt, report: Any = report) -> int:
            if index:
                return int(any_rig.client.post(f"/jobs/{job_id}/cancel").status_code)
            return int(any_rig.report(attempt, "exit", report).status_code)

        assert in_threads(2, race)[0] == 200
        assert any_rig.status(job_id) is JobStatus.SUCCEEDED
