"""The lifecycle of a job as a user sees it, on both databases."""

import itertools
import json
from datetime import datetime, timedelta

import pytest

from tests.service.harness import ServiceHarness, path_of
from trainyard.contract.rundir import RunDir
from trainyard.contract.status import JobStatus, Reason, can_transition


def test_from_submit_to_success(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running(steps=3)
    for step in (1, 2, 3):
        attempt.metric(step, loss=3.0 - step / 10)
    rig.checkpoint(job_id, attempt, 3)
    attempt.say("finished", outcome="completed", step=3)
    rig.exit(attempt, "completed", step=3, message="all 3 steps are done")

    job = rig.job(job_id)
    assert job["status"] == "succeeded"
    assert job["reason"] is None
    assert job["error"] is None
    assert job["message"] == "all 3 steps are done"
    assert job["progress"]["step"] == 3
    assert job["progress"]["percent"] == 100.0
    assert job["progress"]["loss"] == pytest.approx(2.7)
    assert job["checkpoint"]["step"] == 3
    assert job["plan"]["tokens"] == 12345
    assert job["plan"]["bad_lines"] == 1
    per_step = job["plan"]["flops_per_token"] * job["plan"]["tokens_per_step"]
    assert job["plan"]["flops"] == pytest.approx(per_step * job["plan"]["steps"])
    assert job["started_at"]
    assert job["finished_at"] >= job["started_at"] >= job["created_at"]
    assert job["summary"] == "Finished at step 3, loss 2.700."
    assert [m["step"] for m in rig.data(job_id, "metrics")] == [1, 2, 3]
    assert path_of(rig.data(job_id, "events")) == ["starting", "running", "succeeded"]
    assert all(device["job_id"] is None for device in rig.get("/devices")["data"])


def test_pause_and_resume(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    attempt.metric(4)
    rig.checkpoint(job_id, attempt, 5)
    rig.ship(attempt)

    assert rig.post_action(job_id, "pause")["status"] == "pausing"
    assert rig.post_action(job_id, "pause")["status"] == "pausing"
    assert rig.heartbeat(attempt)["desired"] == "pause"
    rig.reconcile()
    assert attempt.stop_asked == 1
    rig.reconcile()
    assert attempt.stop_asked == 1
    rig.exit(attempt, "stopped", Reason.USER, step=5)

    paused = rig.job(job_id)
    assert (paused["status"], paused["reason"], paused["resumable"]) == ("paused", "user", True)
    assert paused["summary"] == "Paused at step 5; resuming continues from step 5."

    assert rig.post_action(job_id, "resume")["status"] == "queued"
    assert rig.post_action(job_id, "resume")["status"] == "queued"
    second = rig.next_attempt(job_id, 2, start_step=5)
    second.metric(6)
    rig.exit(second, "completed", step=10)
    attempts = rig.data(job_id, "attempts")
    assert [(a["number"], a["trigger"], a["outcome"], a["start_step"]) for a in attempts] == [
        (1, "submit", "stopped", 0),
        (2, "resume", "completed", 5),
    ]
    assert path_of(rig.data(job_id, "events")) == [
        "starting", "running", "pausing", "paused", "queued", "starting", "running", "succeeded",
    ]  # fmt: skip


def test_resume_without_a_checkpoint_starts_anew_and_says_so(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", Reason.USER, step=0)
    assert rig.job(job_id)["summary"] == "Paused; no checkpoint, so resuming starts from scratch."
    rig.post_action(job_id, "resume")
    asked = [e for e in rig.data(job_id, "events") if e["actor"] == "local"][-1]
    assert "there is no checkpoint: it starts from scratch" in asked["message"]


def test_cancel_saves_and_frees_the_device(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running(resources={"nproc_per_node": 2})
    waiting = rig.submit()
    rig.reconcile()
    assert rig.job(waiting)["queue"] == {"position": 1, "waiting_for": "1 CPU slot; 0 of 2 free"}
    assert rig.job(waiting)["summary"] == "Waiting for 1 CPU slot; 0 of 2 free. Position 1."

    assert rig.post_action(job_id, "cancel")["status"] == "cancelling"
    assert rig.heartbeat(attempt)["desired"] == "cancel"
    rig.reconcile()
    assert rig.status(waiting) is JobStatus.QUEUED
    rig.exit(attempt, "stopped", Reason.USER, step=7)
    cancelled = rig.job(job_id)
    assert (cancelled["status"], cancelled["message"]) == ("cancelled", "stopped at step 7")
    assert cancelled["finished_at"] is not None
    rig.reconcile()
    assert rig.status(waiting) is JobStatus.STARTING


def test_kill_of_a_cancelling_job_hurries_it(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    rig.post_action(job_id, "cancel")
    assert rig.post_action(job_id, "kill")["desired"] == "kill"
    assert rig.post_action(job_id, "cancel")["desired"] == "kill"
    assert rig.heartbeat(attempt)["desired"] == "kill"
    rig.exit(attempt, "killed", Reason.USER, step=3)
    job = rig.job(job_id)
    assert (job["status"], job["reason"]) == ("cancelled", "user")
    assert job["message"] == "killed at step 3; no checkpoint was written at this stop"


@pytest.mark.parametrize("verb", ["cancel", "kill"])
def test_a_job_that_waits_is_cancelled_at_once(any_rig: ServiceHarness, verb: str) -> None:
    job_id = any_rig.submit()
    assert any_rig.post_action(job_id, verb)["status"] == "cancelled"
    any_rig.reconcile()
    assert any_rig.launcher.starts == []


def test_a_finish_that_beats_the_cancel_is_a_success(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    any_rig.post_action(job_id, "cancel")
    any_rig.exit(attempt, "completed", step=10)
    assert any_rig.status(job_id) is JobStatus.SUCCEEDED


def test_an_end_that_nobody_explains_is_never_success(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running(resources={"max_restarts": 0})
    any_rig.exit(attempt, "crashed", Reason.UNKNOWN, step=10)
    job = any_rig.job(job_id)
    assert (job["status"], job["reason"]) == ("failed", "unknown")
    assert job["error"]["message"] == "crashed at step 10"


def test_a_crash_waits_longer_each_time_and_then_fails(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running(resources={"max_restarts": 2})
    rig.exit(attempt, "crashed", Reason.WORKER_CRASHED, step=1)
    job = rig.job(job_id)
    assert job["status"] == "interrupted"
    assert job["message"] == "crashed at step 1; restarting in 5 s, 1 of 2"
    with rig.clock.standing(datetime.fromisoformat(job["restart_at"]) - timedelta(seconds=1)):
        rig.reconcile()
    assert rig.status(job_id) is JobStatus.INTERRUPTED
    rig.clock.forward(6)
    second = rig.next_attempt(job_id, 2)
    rig.exit(second, "crashed", Reason.WORKER_CRASHED, step=1)
    assert rig.job(job_id)["message"].endswith("restarting in 20 s, 2 of 2")
    rig.clock.forward(21)
    third = rig.next_attempt(job_id, 3)
    rig.exit(third, "crashed", Reason.WORKER_CRASHED, step=1)
    job = rig.job(job_id)
    assert (job["status"], job["reason"]) == ("failed", "max_restarts")
    assert job["error"]["code"] == "worker_crashed"
    assert job["restart_at"] is None
    assert [a["trigger"] for a in rig.data(job_id, "attempts")] == ["submit", "restart", "restart"]

    rig.post_action(job_id, "resume")
    fourth = rig.next_attempt(job_id, 4)
    rig.exit(fourth, "crashed", Reason.WORKER_CRASHED, step=1)
    assert rig.job(job_id)["message"].endswith("1 of 2"), "a resume by hand counts anew"


def test_resume_by_hand_skips_the_wait(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    any_rig.exit(attempt, "crashed", Reason.WORKER_CRASHED, step=1)
    assert any_rig.post_action(job_id, "resume")["status"] == "queued"
    any_rig.reconcile()
    assert any_rig.status(job_id) is JobStatus.STARTING


def test_pause_calls_a_restart_off(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    any_rig.exit(attempt, "crashed", Reason.WORKER_CRASHED, step=1)
    paused = any_rig.post_action(job_id, "pause")
    assert (paused["status"], paused["restart_at"]) == ("interrupted", None)
    assert paused["message"] == "crashed at step 1; the restart was called off"
    any_rig.clock.forward(1000)
    any_rig.reconcile()
    assert any_rig.status(job_id) is JobStatus.INTERRUPTED
    any_rig.post_action(job_id, "pause", status=409)


def test_a_termination_from_outside_restarts_without_using_restarts_up(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running(resources={"max_restarts": 0})
    any_rig.exit(attempt, "stopped", Reason.USER, step=4)
    job = any_rig.job(job_id)
    assert (job["status"], job["reason"]) == ("interrupted", "terminated")
    assert job["message"] == "stopped at step 4; restarting in 5 s"
    any_rig.clock.forward(6)
    any_rig.reconcile()
    assert any_rig.status(job_id) is JobStatus.STARTING


def test_a_success_goes_on_only_with_more_to_do(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    rig.exit(attempt, "completed", step=10)
    job = rig.job(job_id)
    assert (job["resumable"], job["resume_blocker"]) == (
        False,
        "finished: give more epochs, max_steps or max_tokens to continue",
    )
    rig.post_action(job_id, "resume", status=409)
    assert rig.post_action(job_id, "resume", {"epochs": 1}, status=422)["errors"][0]["pointer"] == "/epochs"
    assert rig.post_action(job_id, "resume", {"max_steps": 10}, status=422)["errors"][0]["pointer"] == "/max_steps"
    again = rig.post_action(job_id, "resume", {"epochs": 2})
    assert (again["status"], again["spec"]["training"]["epochs"], again["finished_at"]) == ("queued", 2, None)
    rig.reconcile()
    assert rig.launcher.of(job_id, 2).launch.spec.training.epochs == 2


def test_delete_removes_record_and_files(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    attempt.metric(1)
    attempt.say("sample", step=1, prompt="a", text="b")
    path = rig.checkpoint(job_id, attempt, 1)
    refused = rig.client.delete(f"/jobs/{job_id}")
    assert refused.status_code == 409
    rig.exit(attempt, "completed", step=1)
    assert path.exists()
    assert rig.client.delete(f"/jobs/{job_id}").status_code == 204
    assert not path.exists()
    assert not (rig.home / "runs" / job_id).exists()
    for what in ("", "/metrics", "/events", "/attempts", "/checkpoints", "/samples", "/logs"):
        assert rig.get(f"/jobs/{job_id}{what}", expect=404)["code"] == "job_not_found"
    assert rig.client.delete(f"/jobs/{job_id}").status_code == 404
    assert rig.report(attempt, "heartbeat", {}).status_code == 401


def test_resume_may_change_save_dir_and_delete_removes_both(rig: ServiceHarness) -> None:
    old, new = rig.home / "kept", rig.home / "larger"
    new.mkdir()
    job_id, attempt = rig.running(checkpoint={"save_dir": str(old)})
    rig.exit(attempt, "failed", Reason.DISK_FULL, step=3)
    changed = rig.post_action(job_id, "resume", {"save_dir": str(new)})
    assert changed["spec"]["checkpoint"]["save_dir"] == str(new)
    changes = [(event["data"] or {}).get("changes") for event in rig.data(job_id, "events")]
    assert ["/checkpoint/save_dir"] in changes
    rig.post_action(job_id, "cancel")
    # The files are moved by the next attempt, which never came.
    directory = RunDir(rig.home / "runs" / job_id).attempt(1)
    directory.path.mkdir(parents=True)
    directory.spec.write_text(json.dumps({"checkpoint": {"save_dir": str(old)}}))
    for folder in (old, new):
        (folder / job_id / "checkpoints").mkdir(parents=True)
    assert rig.client.delete(f"/jobs/{job_id}").status_code == 204
    assert [list(folder.iterdir()) for folder in (old, new)] == [[], []]


@pytest.mark.parametrize("save_dir", ["/outside", "relative", 3, "/etc/passwd/x"])
def test_resume_refuses_a_save_dir_as_submit_does(rig: ServiceHarness, save_dir: object) -> None:
    job_id, attempt = rig.running()
    rig.exit(attempt, "failed", Reason.DISK_FULL, step=3)
    refused = rig.client.post(f"/jobs/{job_id}/resume", json={"save_dir": save_dir})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/save_dir"), refused.text
    assert rig.job(job_id)["status"] == "failed"


def test_delete_removes_what_was_kept_in_save_dir_and_nothing_else(rig: ServiceHarness) -> None:
    save_dir = rig.home / "kept"
    (save_dir / "other").mkdir(parents=True)
    job_id = rig.submit(checkpoint={"save_dir": str(save_dir)})
    (save_dir / job_id / "checkpoints").mkdir(parents=True)
    rig.post_action(job_id, "cancel")
    assert rig.client.delete(f"/jobs/{job_id}").status_code == 204
    assert [p.name for p in save_dir.iterdir()] == ["other"]


def test_delete_does_not_follow_a_link(rig: ServiceHarness) -> None:
    job_id = rig.submit()
    rig.post_action(job_id, "cancel")
    precious = rig.home.parent / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (rig.home / "runs").mkdir(exist_ok=True)
    (rig.home / "runs" / job_id).symlink_to(precious)
    assert rig.client.delete(f"/jobs/{job_id}").status_code == 204
    assert (precious / "file").exists()


def test_every_change_in_the_log_is_in_the_table(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    rig.exit(attempt, "crashed", Reason.HUNG, step=1)
    rig.post_action(job_id, "resume")
    rig.post_action(job_id, "pause")
    rig.post_action(job_id, "resume")
    second = rig.next_attempt(job_id, 2)
    rig.post_action(job_id, "pause")
    rig.post_action(job_id, "kill")
    rig.exit(second, "killed", Reason.USER, step=2)
    statuses = ["queued", *path_of(rig.data(job_id, "events"))]
    assert statuses[-1] == "cancelled"
    for before, after in itertools.pairwise(statuses):
        assert can_transition(JobStatus(before), JobStatus(after)), (before, after)


def test_an_end_beyond_the_last_point_counts(any_rig: ServiceHarness) -> None:
    """Its disk was full: the points of the last steps never came."""
    job_id, attempt = any_rig.running(steps=400)
    attempt.metric(200)
    any_rig.ship(attempt)
    any_rig.exit(attempt, "failed", Reason.DIVERGED, step=300)
    progress = any_rig.job(job_id)["progress"]
    assert (progress["step"], progress["percent"], progress["eta_seconds"]) == (300, 75.0, None)
