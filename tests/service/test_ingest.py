"""Ingest: each reported line once and in order; an invalid line does not block the next one."""

import json
from dataclasses import asdict
from typing import Any

import httpx2
import pytest

from tests.faults.service_home import until
from tests.service.harness import ServiceHarness, in_threads
from trainyard.contract.attempt_proof import ANSWER_HEADER, RequestProof, key_of
from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.status import JobStatus, Reason
from trainyard.service.ingest.parsing import contiguous, parse_event


def test_duplicates_gaps_and_disorder(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    for step in range(1, 8):
        attempt.metric(step)
    lines = attempt.lines
    assert rig.ship(attempt, [lines[3], lines[1], lines[2]])["acked"] == 4
    assert rig.ship(attempt, lines[1:3])["acked"] == 4
    assert rig.ship(attempt, [lines[6]])["acked"] == 4
    assert [m["step"] for m in rig.data(job_id, "metrics")] == [1, 2, 3]
    assert rig.ship(attempt, lines)["acked"] == 8
    assert [m["step"] for m in rig.data(job_id, "metrics")] == list(range(1, 8))


POISON: list[Any] = [
    {"kind": "nonsense"},
    {"kind": 5},
    {"kind": ["a"]},
    {},
    {"kind": "unreadable", "bytes": 12},
    {"kind": "metric", "step": -1},
    {"kind": "metric", "step": 2**70, "epoch": 1, "loss": 1, "learning_rate": 1, "tokens": 1},
    {"kind": "metric", "step": 5, "epoch": 1, "loss": 1, "learning_rate": 1, "tokens": 2**64},
    {"kind": "metric", "step": 5, "epoch": 1, "loss": 1, "learning_rate": 1, "tokens": 1, "at": "never"},
    {
        "kind": "metric",
        "step": 5,
        "epoch": 1,
        "loss": 1,
        "learning_rate": 1,
        "tokens": 1,
        "at": "0001-01-01T00:00:00+14:00",
    },
    {"kind": "phase", "phase": "dancing"},
    {"kind": "warning", "code": "x", "message": "deep", "data": {"a": json.loads("[" * 60 + "]" * 60)}},
    {"kind": "checkpoint", "step": 1, "path": "/x", "bytes": 10**30, "sha256": "a"},
]


@pytest.mark.parametrize("index", range(len(POISON)))
def test_a_line_that_cannot_be_read_is_kept_as_a_warning(any_rig: ServiceHarness, index: int) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    attempt.lines.append({**POISON[index], "seq": 2})
    attempt.metric(1)
    assert rig.ship(attempt)["acked"] == 3
    assert [m["step"] for m in rig.data(job_id, "metrics")] == [1]
    warnings = [e for e in rig.data(job_id, "events") if e["kind"] == "warning"]
    assert len(warnings) == 1
    assert warnings[0]["message"].startswith("line 2 of the outbox")
    assert [a["code"] for a in rig.job(job_id)["alerts"]][-1] == "unreadable_line"


@pytest.mark.parametrize("text", ["nul \0 inside", "lone \ud800 surrogate", "x" * 300_000, "\u202eright to left", ""])
def test_texts_that_no_database_takes_are_mended(any_rig: ServiceHarness, text: str) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    attempt.say("sample", step=1, prompt=text, text=text, note="at most 9 new tokens")
    attempt.say("warning", code="c", message=text, data={text: [text]})
    attempt.say("checkpoint", step=1, path=f"/{text}", bytes=1, sha256="a")
    attempt.say("phase", phase="saving", message=text)
    assert rig.ship(attempt)["acked"] == 5
    sample = rig.data(job_id, "samples")[0]
    assert len(sample["text"]) == min(len(text), 100_000)
    assert "\0" not in sample["text"]
    assert sample["note"] == "at most 9 new tokens"
    rig.job(job_id)


def test_numbers_that_are_not_finite(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    attempt.metric(1, loss=None, nonfinite=True)
    rig.ship(attempt)
    raw = json.dumps({"events": [attempt.metric(2), attempt.metric(3)]}).replace('"loss": 2.0', '"loss": 1e999')
    assert rig.report(attempt, "events", raw).json()["acked"] == 4
    found = rig.data(job_id, "metrics")
    assert [(m["loss"], m["nonfinite"]) for m in found] == [(None, True)] * 3
    assert rig.job(job_id)["progress"]["nonfinite"] is True


def test_an_agent_and_the_service_prove_themselves_without_the_token(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    attempt_id, token = attempt.launch.attempt_id, attempt.launch.token
    attempt.metric(1)
    body = json.dumps({"events": attempt.lines}).encode()
    proof = RequestProof.of(token, f"{attempt_id}/events", body)

    def post(resource: str, content: bytes, authorization: str) -> httpx2.Response:
        headers = {"Authorization": authorization, "Content-Type": "application/json"}
        return rig.client.post(f"/internal/attempts/{attempt_id}/{resource}", content=content, headers=headers)

    other_body = body.replace(b'"step": 1', b'"step": 9')
    assert other_body != body
    for rejected in (
        post("events", other_body, proof.header),
        post("exit", body, proof.header),
        post("events", body, RequestProof.of("a guess", f"{attempt_id}/events", body).header),
        post("events", body, proof.header[:-2]),
    ):
        assert (rejected.status_code, rejected.json()["code"]) == (401, "unauthorized")
        assert ANSWER_HEADER not in rejected.headers
    assert rig.data(job_id, "metrics") == []
    answer = post("events", body, proof.header)
    assert answer.status_code == 200, answer.text
    assert proof.is_answered_by(key_of(token), answer.headers[ANSWER_HEADER], answer.content)
    assert [point["step"] for point in rig.data(job_id, "metrics")] == [1]
    # Agents of 0.1 send the token itself, and expect no proof.
    of_old = rig.report(attempt, "heartbeat", {"step": 1})
    assert of_old.status_code == 200
    assert ANSWER_HEADER not in of_old.headers


def test_a_token_reports_only_its_own_attempt(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, one = rig.running()
    _, two = rig.running()
    one.metric(1)
    for what, body in (("events", {"events": one.lines}), ("heartbeat", {"step": 5}), ("exit", _report(one))):
        refused = rig.report(one, what, body, token=two.launch.token)
        assert refused.status_code == 401
        assert refused.json()["code"] == "unauthorized"
        assert rig.report(one, what, body, token="").status_code == 401
    assert rig.data(job_id, "metrics") == []
    assert rig.status(job_id) is JobStatus.RUNNING
    unknown = rig.client.post("/internal/attempts/att_x/heartbeat", json={}, headers={"Authorization": "Bearer x"})
    assert unknown.status_code == 401


def _report(attempt: Any) -> dict[str, Any]:
    body: dict[str, Any] = attempt.end("completed", step=1).model_dump(mode="json")
    return body


@pytest.mark.parametrize("body", [None, [], "x", {}, {"events": []}, {"events": [1]}, {"events": [{}] * 5001}])
def test_a_batch_that_is_no_batch(rig: ServiceHarness, body: Any) -> None:
    _, attempt = rig.running()
    assert rig.report(attempt, "events", body).status_code == 422


def test_a_line_without_a_number_is_a_gap(rig: ServiceHarness) -> None:
    _, attempt = rig.running()
    good = attempt.metric(1)
    for seq in (None, "2", 2.0, True, -1):
        assert rig.ship(attempt, [{**good, "seq": seq}])["acked"] == 1
    assert rig.ship(attempt, [good])["acked"] == 2


def test_exit_reports_that_no_database_takes(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    body = _report(attempt)
    body |= {"message": "a\0b", "ranks": [{"rank": 0, "exit_code": 2**70}], "step": 2**70}
    assert any_rig.report(attempt, "exit", body).status_code == 200
    assert any_rig.status(job_id) is JobStatus.SUCCEEDED
    assert "\0" not in any_rig.job(job_id)["message"]


def test_checkpoints_are_listed_while_they_are_there(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    first, second = rig.checkpoint(job_id, attempt, 1), rig.checkpoint(job_id, attempt, 2)
    rig.ship(attempt)
    listed = rig.data(job_id, "checkpoints")
    assert [(c["step"], c["path"], c["kind"], c["attempt"]) for c in listed] == [
        (2, str(second), "full", 1),
        (1, str(first), "full", 1),
    ]
    attempt.say("checkpoint_removed", step=1, path=str(first))
    rig.ship(attempt)
    assert [c["step"] for c in rig.data(job_id, "checkpoints")] == [2]
    second.rmdir()
    # Removed by hand, which no commit shows: responses are kept for up to a second.
    until(lambda: rig.data(job_id, "checkpoints") == [])
    until(lambda: rig.job(job_id)["checkpoint"] is None)


def test_a_milestone_becomes_its_weights_in_its_own_place(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    paths = [rig.checkpoint(job_id, attempt, step) for step in (10, 20, 30)]
    rig.ship(attempt)
    thin = paths[0].with_name(f"{paths[0].name}-weights")
    paths[0].rename(thin)
    for _ in range(2):
        attempt.say("checkpoint", step=10, path=str(thin), bytes=4, sha256="b" * 64, checkpoint_kind="weights")
        attempt.say("checkpoint_removed", step=10, path=str(paths[0]), why="only its weights are kept")
    rig.ship(attempt)
    listed = [(c["step"], c["kind"], c["bytes"]) for c in rig.data(job_id, "checkpoints")]
    assert sorted(listed) == [(10, "weights", 4), (20, "full", 10), (30, "full", 10)]
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", Reason.USER, step=30)
    assert rig.post_action(job_id, "resume", {"step": 10}, status=409)["code"] == "step_unavailable"
    job = rig.job(job_id)
    assert job["checkpoint"]["step"] == 30


@pytest.mark.parametrize(
    ("why", "says"),
    [
        ("retention", "removed the checkpoint of step 10: retention"),
        ("invalid", "set aside the checkpoint of step 10: invalid"),
        ("superseded", "set aside the checkpoint of step 10: superseded"),
    ],
)
def test_what_is_set_aside_is_not_called_removed(rig: ServiceHarness, why: str, says: str) -> None:
    job_id, attempt = rig.running()
    path = rig.checkpoint(job_id, attempt, 10)
    attempt.say("checkpoint_removed", step=10, path=str(path), why=why)
    rig.ship(attempt)
    assert rig.data(job_id, "events")[-1]["message"] == says
    assert rig.data(job_id, "checkpoints") == []


def test_a_checkpoint_written_again_is_one_row(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    weights = rig.home / "pretrain_512.pth"
    weights.touch()
    for step in (1, 2):
        attempt.say("checkpoint", step=step, path=str(weights), bytes=1, sha256="b" * 64, checkpoint_kind="weights")
    rig.ship(attempt)
    assert [(c["step"], c["kind"]) for c in rig.data(job_id, "checkpoints")] == [(2, "weights")]
    assert rig.job(job_id)["checkpoint"] is None, "weights alone cannot be resumed from"


def test_warnings_become_alerts_once_a_code(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    for step in (1, 2, 3):
        attempt.say("warning", code="spike", message=f"spike at {step}", step=step)
    attempt.say("warning", code="slow", message="slow")
    rig.ship(attempt)
    alerts = [a for a in rig.job(job_id)["alerts"] if a["code"] != "cpu_fallback"]
    assert [(a["code"], a["message"], a["step"]) for a in alerts] == [
        ("spike", "spike at 3", 3),
        ("slow", "slow", None),
    ]
    assert sum(e["kind"] == "warning" for e in rig.data(job_id, "events")) == 4


@pytest.mark.parametrize(
    ("found", "difference", "says"),
    [
        (2.5, 0.0, "the probe of step 1,200 was saved with 2.500000 and is 2.500000, difference 0"),
        (2.75, 0.25, "the probe of step 1,200 was saved with 2.500000 and is 2.750000, difference 0.25"),
        (None, None, "the probe of step 1,200 was saved with 2.500000 and is not finite"),
    ],
)
def test_a_verified_resume_is_an_event(
    rig: ServiceHarness, found: float | None, difference: float | None, says: str
) -> None:
    job_id, attempt = rig.running()
    attempt.say("resume_verified", step=1200, expected=2.5, found=found, difference=difference)
    rig.ship(attempt)
    (event,) = [e for e in rig.data(job_id, "events") if e["kind"] == "resume_verified"]
    assert event["message"] == says
    assert event["data"] == {"step": 1200, "expected": 2.5, "found": found, "difference": difference}
    assert [alert["code"] for alert in rig.job(job_id)["alerts"]] == ["cpu_fallback"]


def test_progress_between_two_points(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running(steps=100)
    attempt.metric(10, step_seconds=2.0)
    rig.ship(attempt)
    assert rig.job(job_id)["progress"]["eta_seconds"] == pytest.approx(180.0)
    with rig.database.write() as session:
        session.connection().exec_driver_sql("UPDATE attempts SET heard_at = '2020-01-01 00:00:00.000000'")
    rig.heartbeat(attempt, step=50)
    progress = rig.job(job_id)["progress"]
    assert (progress["step"], progress["percent"], progress["loss"]) == (50, 50.0, 2.0)
    assert progress["eta_seconds"] == pytest.approx(100.0)
    rig.heartbeat(attempt, step=3)
    assert rig.job(job_id)["progress"]["step"] == 50
    with rig.database.write() as session:
        session.connection().exec_driver_sql("UPDATE attempts SET heard_at = '2099-01-01 00:00:00.000000'")
    rig.heartbeat(attempt, step=60)
    assert rig.job(job_id)["progress"]["step"] == 60, "the clock was set back"


def test_phases_are_told(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    attempt.say("phase", phase="preparing_data", message="tokenizing", done=3, total=4)
    rig.ship(attempt)
    job = rig.job(job_id)
    assert job["phase"] == "preparing_data"
    assert job["summary"] == "Preparing the data (75 %): tokenizing."
    rig.exit(attempt, "failed", Reason.DATA_INVALID, message="corpus.jsonl, line 7: not JSON")
    job = rig.job(job_id)
    assert (job["phase"], job["reason"]) == (None, "data_invalid")
    assert job["summary"] == "Corpus.jsonl, line 7: not JSON."


def test_an_evaluation_done_by_the_next_attempt_takes_the_place_of_its_step(any_rig: ServiceHarness) -> None:
    job_id, first = any_rig.running()
    for step in (2, 4):
        first.metric(step)
    any_rig.exit(first, "crashed", Reason.WORKER_CRASHED, step=4)
    any_rig.post_action(job_id, "resume")
    second = any_rig.next_attempt(job_id, 2, start_step=4)
    second.metric(4, eval_loss=2.5)
    second.metric(6)
    any_rig.ship(second)
    points = [(point["step"], point["attempt"], point["eval_loss"]) for point in any_rig.data(job_id, "metrics")]
    assert points == [(2, 1, None), (4, 2, 2.5), (6, 2, None)]


def test_agents_of_one_job_at_once(any_rig: ServiceHarness) -> None:
    """The same lines from many threads: each is stored once."""
    job_id, attempt = any_rig.running()
    for step in range(1, 51):
        attempt.metric(step)
    answers = in_threads(6, lambda _: any_rig.ship(attempt)["acked"])
    assert answers == [51] * 6
    assert [m["step"] for m in any_rig.data(job_id, "metrics")] == list(range(1, 51))


def test_contiguous_is_pure() -> None:
    lines = [{"seq": n} for n in (5, 3, 4, 7, 3)]
    assert [line["seq"] for line in contiguous(lines, 2)] == [3, 4, 5]
    assert list(contiguous(lines, 0)) == []


def test_a_naive_time_is_utc() -> None:
    event = parse_event({"kind": "sample", "seq": 1, "step": 1, "prompt": "", "text": "", "at": "2026-01-01T00:00:00"})
    assert event.at.isoformat() == "2026-01-01T00:00:00+00:00"


def test_a_file_that_changed_while_the_job_was_queued_is_in_job_and_event(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    was = FileFingerprint.of(rig.corpus)
    (started,) = attempt.lines
    unchanged = {"data_path": asdict(was), "eval_data_path": {"bytes": 1, "sha256": "b"}}
    attempt.lines = [{**started, "seq": 2, "inputs": unchanged}]
    rig.ship(attempt)
    before = {alert["code"] for alert in rig.job(job_id)["alerts"]}
    assert "inputs_changed" not in before
    attempt.lines = [{**started, "seq": 3, "inputs": {"data_path": {"bytes": was.bytes + 5, "sha256": "c"}}}]
    rig.ship(attempt)
    message = next(alert["message"] for alert in rig.job(job_id)["alerts"] if alert["code"] == "inputs_changed")
    assert f"data_path ({was.bytes:,} bytes then, {was.bytes + 5:,} now)" in message
    assert message in [event["message"] for event in rig.data(job_id, "events") if event["kind"] == "warning"]
    # A line that is no fingerprint is kept as a warning, and the lines after it are stored.
    attempt.lines = [{**started, "seq": 4, "inputs": {"data_path": {"bytes": "x"}}}]
    assert rig.ship(attempt)["acked"] == 4
