from typing import Any

import pytest

from tests.client.fake_service import NOW, job
from trainyard.client.cli.hints import MAX_LOG_LINES, end_report, error_card, next_commands
from trainyard.client.cli.watch.job_page import alert_text, job_page
from trainyard.client.errors import AmbiguousName, ServiceUnreachable, TrainyardError, WaitTimedOut, api_error
from trainyard.client.exit_codes import Exit, exit_of_error, exit_of_job, is_idle, restart_pending
from trainyard.contract.status import IDLE, JobStatus


def page(**changes: Any) -> list[str]:
    return job_page(job(**changes), NOW)


def test_the_page_of_a_running_job() -> None:
    assert page(labels={"b": "2", "a": "1"}, reason=None, started_at="2026-01-31T15:31:05Z") == [
        "pre-12   job_7f3kq9   > RUNNING (training)",
        "Step 12,400 of 40,000.",
        "",
        "  progress   step 12,400 of 40,000, 31.0 %, ETA 2 h 10 min",
        "  numbers    loss 2.887, lr 2.61e-04, grad norm 0.48, 118,240 tok/s, 406 M tokens",
        "  checkpoint step 12,000, 3 min ago, 766.0 MB, /runs/step-00012000",
        "  attempt    2",
        "  labels     a=1 b=2",
        "  times      created 2 h ago, started 1 h ago",
        "  resume     not possible: the job is running",
        "",
        "  you can: pause",
    ]


def test_the_slowest_rank_is_shown() -> None:
    progress = {**job()["progress"], "step_seconds_max_rank": 1, "step_seconds_spread": 1.1742}
    assert "  slowest    rank 1 computes 1.17 x as long as the median rank" in page(progress=progress)


def test_the_page_of_a_queued_job() -> None:
    lines = page(
        status="queued",
        progress=None,
        checkpoint=None,
        attempt=None,
        summary="Waiting for 2 GPUs. Position 3.",
        queue={"position": 3, "waiting_for": "2 GPUs; 1 of 4 free"},
        resume_blocker=None,
    )
    assert lines[:2] == ["pre-12   job_7f3kq9   ~ QUEUED", "Waiting for 2 GPUs. Position 3."]
    assert "  queue      position 3, waiting for 2 GPUs; 1 of 4 free" in lines
    assert not any(line.startswith(("  progress", "  numbers", "  checkpoint", "  attempt")) for line in lines)


def test_the_page_has_the_corpus() -> None:
    assert "  corpus     /data/a.jsonl" in page(spec={"data": {"data_path": "/data/a.jsonl"}})


@pytest.mark.parametrize(
    ("alert", "text"), [("flat", "flat"), ({"message": "flat", "code": "x"}, "flat"), ({"code": 1}, "{'code': 1}")]
)
def test_alerts_are_texts(alert: object, text: str) -> None:
    assert alert_text(alert) == text


def test_a_job_of_an_older_service_has_a_page_too() -> None:
    assert job_page({"id": "job_1", "name": "n", "status": "novel"}, NOW) == ["n   job_1   ? NOVEL"]


# The error card


def test_no_error_no_card() -> None:
    assert error_card(job()) == []


def test_the_card_has_what_the_evidence_and_the_hint() -> None:
    lines = [f"line {number}" for number in range(MAX_LOG_LINES + 5)]
    card = {
        "code": "hung",
        "message": "no step for 60 s",
        "rank": 0,
        "traceback": "\n".join(lines) + "\n",
        "hint": "look",
    }
    shown = error_card(job(error=card))
    assert shown[0] == "error: no step for 60 s (rank 0) [hung]"
    assert shown[1:-1] == [f"  | {line}" for line in lines[5:]]
    assert shown[-1] == "hint: look"
    newer = {**card, "log_tail": ["printed last"], "peak_memory_bytes": 61 * 10**9}
    assert error_card(job(error=newer))[1:] == ["  | printed last", "peak memory of a rank: 61.0 GB", "hint: look"]


def test_next_actions_of_a_failed_job_are_those_of_the_service() -> None:
    helps = [
        {"words": "Fork from step 400 with learning_rate 0.001", "command": "trainyard fork job_1 --step 400"},
        {"words": "Resume from step 400", "command": "trainyard resume job_1"},
    ]
    failed = job("failed", error={"code": "diverged", "message": "why", "next": helps})
    typed = ["next:", *(f"  {line}" for one in helps for line in (f"# {one['words']}", one["command"]))]
    assert end_report(failed, "a")[-5:] == typed
    page = job_page(failed, NOW)
    assert page[page.index("next:") :][:5] == typed


# What to type next


@pytest.mark.parametrize("status", list(JobStatus))
def test_there_is_always_something_to_type(status: JobStatus) -> None:
    commands = next_commands(job(status, resumable=True), "my run; rm -rf /")
    assert commands
    for command in commands:
        assert command.startswith("trainyard ")
        assert "'my run; rm -rf /'" in command


def test_resume_is_suggested_only_if_it_is_possible() -> None:
    assert "trainyard resume a" in next_commands(job("failed", resumable=True), "a")
    assert "trainyard resume a" not in next_commands(job("failed", resumable=False), "a")


def test_the_end_report() -> None:
    assert end_report(job("failed", message="why", resume_blocker="its checkpoints are gone"), "a") == [
        "failed: why",
        "cannot be resumed: its checkpoints are gone",
        "next:",
        "  trainyard logs a --tail 50",
    ]
    assert end_report(job("succeeded", message=None, summary="Finished."), "a")[0] == "succeeded: Finished."
    assert not any("resumed" in line for line in end_report(job("succeeded", resume_blocker="finished"), "a"))


# Exit codes


@pytest.mark.parametrize("status", list(JobStatus))
def test_a_job_has_an_exit_code_exactly_when_it_is_idle(status: JobStatus) -> None:
    assert is_idle(job(status)) == (status in IDLE)
    assert (exit_of_job(job(status)) is not None) == (status in IDLE)


def test_only_a_pending_restart_keeps_an_interrupted_job_going() -> None:
    due = job("interrupted", restart_at="2026-01-31T16:31:10Z")
    assert restart_pending(due)
    assert not is_idle(due)
    assert not restart_pending(job("paused", restart_at="2026-01-31T16:31:10Z"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceUnreachable("u", "c"), Exit.NO_SERVICE),
        (api_error(401, {}), Exit.NOT_AUTHORISED),
        (api_error(403, {}), Exit.NOT_AUTHORISED),
        (api_error(404, {}), Exit.REJECTED),
        (api_error(422, {}), Exit.REJECTED),
        (api_error(500, {}), Exit.REJECTED),
        (AmbiguousName("n", []), Exit.USAGE),
        (WaitTimedOut(1.0, None), Exit.TIMED_OUT),
        (TrainyardError("t"), Exit.REJECTED),
    ],
)
def test_each_error_has_its_code(error: TrainyardError, code: Exit) -> None:
    assert exit_of_error(error) == code


def test_the_codes_are_those_of_the_contract() -> None:
    assert [int(code) for code in Exit] == [0, 1, 2, 3, 4, 10, 11, 12, 124, 130]


def test_a_finished_job_names_its_weights() -> None:
    weights = "/runs/job_7f3kq9/out/pretrain_512.pth"
    assert f"  weights    {weights}" in page(status="succeeded", weights_path=weights)
    assert not any(line.startswith("  weights") for line in page())


def test_the_page_has_the_files_and_sources_of_a_corpus() -> None:
    files = job_page(job(spec={"data": {"data_path": ["/a.jsonl", "/b"]}}), NOW)
    assert "  corpus     /a.jsonl, /b" in files
    many = job_page(job(spec={"data": {"data_path": [f"/{number}" for number in range(9)]}}), NOW)
    assert "  corpus     /0, /1, /2, /3, /4, and 4 more" in many
    sources = [{"name": "web", "path": "/web"}, {"name": "code", "path": ["/c", "/d"]}]
    assert "  corpus     web: /web; code: /c, /d" in job_page(job(spec={"data": {"sources": sources}}), NOW)
