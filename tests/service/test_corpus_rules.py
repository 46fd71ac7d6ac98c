"""What follows a preparation, its progress, and which preparations the plan starts: pure functions."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest

from trainyard.contract.events import PhaseChanged, WarningEvent
from trainyard.contract.messages import ErrorCard, ExitReport
from trainyard.contract.status import CorpusStatus, JobStatus, Phase, Reason
from trainyard.service.corpora import rules
from trainyard.service.corpora.rules import PreparationEnd, after_preparation
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.launch.base import AttemptRef
from trainyard.service.scheduler.plan import Start, plan
from trainyard.service.scheduler.preparations import (
    MAX_LOCAL,
    InspectPreparation,
    KillPreparation,
    MoveWaitingJob,
    Preparation,
    Prepare,
    StopPreparation,
    WaitingJob,
)
from trainyard.service.scheduler.snapshot import QueuedJob, Snapshot
from trainyard.service.timing import Timing

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def report(
    outcome: Literal["completed", "stopped", "failed", "crashed", "killed"], reason: Reason | None
) -> ExitReport:
    return ExitReport(outcome=outcome, step=0, reason=reason, message="m", last_seq=0, ended_at=NOW)


def end(
    outcome: Literal["completed", "stopped", "failed", "crashed", "killed"],
    reason: Reason | None = None,
    *,
    wanted: bool = True,
    fruitless: int = 0,
    made_progress: bool = False,
    max_restarts: int = 3,
) -> PreparationEnd:
    return after_preparation(
        report(outcome, reason),
        wanted=wanted,
        restarts=1,
        fruitless=fruitless,
        made_progress=made_progress,
        max_restarts=max_restarts,
    )


def test_a_completed_preparation_is_ready_also_if_no_job_waits() -> None:
    assert [end("completed", wanted=wanted).status for wanted in (True, False)] == [CorpusStatus.READY] * 2


@pytest.mark.parametrize("outcome", ["stopped", "killed", "crashed", "failed"])
def test_without_a_job_it_stops(outcome: Literal["stopped", "killed", "crashed", "failed"]) -> None:
    assert end(outcome, Reason.USER, wanted=False).status is CorpusStatus.STOPPED


def test_a_job_that_came_during_the_stop_continues_at_once() -> None:
    after = end("stopped", Reason.USER)
    assert (after.status, after.restart_seconds, after.fruitless) == (CorpusStatus.QUEUED, 0.0, 0)


def test_bad_data_fails_at_once_with_its_own_error() -> None:
    card = ErrorCard(code=Reason.DATA_INVALID, message="line 3", hint="mend it")
    failed = report("failed", Reason.DATA_INVALID).model_copy(update={"error": card})
    after = after_preparation(failed, wanted=True, restarts=0, fruitless=0, made_progress=True, max_restarts=3)
    assert (after.status, after.reason, after.error) == (CorpusStatus.FAILED, Reason.DATA_INVALID, card)


def test_crashes_without_progress_are_limited_and_wait_longer() -> None:
    waits, fruitless = [], 0
    for _ in range(3):
        after = end("crashed", Reason.WORKER_CRASHED, fruitless=fruitless)
        assert after.status is CorpusStatus.QUEUED
        waits.append(after.restart_seconds)
        fruitless = after.fruitless
    assert waits == list(Timing().backoff_seconds)
    last = end("crashed", Reason.WORKER_CRASHED, fruitless=fruitless)
    assert (last.status, last.reason) == (CorpusStatus.FAILED, Reason.MAX_RESTARTS)
    assert "4 attempts in a row made no progress" in last.message


def test_progress_resets_the_count_and_needs_no_wait() -> None:
    after = end("crashed", Reason.WORKER_CRASHED, fruitless=3, made_progress=True)
    assert (after.status, after.fruitless, after.restart_seconds) == (CorpusStatus.QUEUED, 0, 0.0)


def test_a_restarted_host_never_uses_up_a_restart() -> None:
    after = end("crashed", Reason.HOST_RESTARTED, fruitless=3)
    assert (after.status, after.fruitless) == (CorpusStatus.QUEUED, 3)


def test_with_max_restarts_0_the_crash_itself_is_the_reason() -> None:
    after = end("crashed", Reason.WORKER_CRASHED, max_restarts=0)
    assert (after.status, after.reason) == (CorpusStatus.FAILED, Reason.WORKER_CRASHED)


def phase(done: int, seconds: float, total: int = 1000) -> PhaseChanged:
    return PhaseChanged(phase=Phase.PREPARING_DATA, done=done, total=total, at=NOW + timedelta(seconds=seconds))


def test_speed_and_remaining_time() -> None:
    progress = rules.after_events({}, [phase(100, 0.0), phase(200, 1.0)])
    assert (progress["done"], progress["total"], progress["bytes_per_second"]) == (200, 1000, 100.0)
    assert rules.eta_seconds(progress) == 8.0
    assert rules.phase_detail(progress)["eta_seconds"] == 8.0


def test_the_bytes_that_an_earlier_attempt_has_done_are_no_speed() -> None:
    before = rules.after_events({}, [phase(100, 0.0), phase(500, 1.0)])
    progress = rules.after_events(rules.at_start(before), [phase(490, 60.0)])
    assert "bytes_per_second" not in progress
    assert not rules.made_progress(progress)
    assert rules.made_progress(rules.after_events(progress, [phase(501, 61.0)]))


def test_other_events_change_nothing() -> None:
    assert rules.after_events({}, [WarningEvent(code="c", message="m"), PhaseChanged(phase=Phase.PREPARING_DATA)]) == {}


def preparation(name: str, status: CorpusStatus = CorpusStatus.QUEUED, **fields: Any) -> Preparation:
    given = {"order": (0, NOW, int(name[1:])), **fields}
    return Preparation(
        name,
        AttemptRef(name, 1, fields.pop("launcher", "local")),
        status,
        **{key: value for key, value in given.items() if key != "launcher"},
    )


def job(number: int, corpus_id: str | None = None, ranks: int = 1, device: str = "cpu") -> QueuedJob:
    return QueuedJob(f"job_{number}", "n", device, ranks, 0, NOW, number, corpus_id=corpus_id)


def actions(snapshot: Snapshot, kind: type) -> list[Any]:
    return [action for action in plan(snapshot, NOW).actions if isinstance(action, kind)]


def test_a_job_without_its_corpus_gets_no_device_and_the_next_one_does() -> None:
    snapshot = Snapshot(queued=[job(1, "c1", 2), job(2)], devices=cpu_slots(2), preparations=[preparation("c1")])
    decision = plan(snapshot, NOW)
    assert actions(snapshot, Start) == [Start("job_2", ("cpu:0",))]
    assert actions(snapshot, Prepare) == [Prepare("c1", 1)]
    assert decision.waiting == {"job_1": "the preparation of its corpus"}


def test_a_preparation_starts_even_if_runs_use_all_slots() -> None:
    snapshot = Snapshot(
        queued=[job(1, "c1")], devices=cpu_slots(1), leases={"cpu:0": "job_9"}, preparations=[preparation("c1")]
    )
    assert actions(snapshot, Prepare) == [Prepare("c1", 1)]


def test_gpus_wait_for_nothing_and_free_slots_become_tokenizers() -> None:
    devices = (Device("cuda:0", "cuda"), *cpu_slots(8))
    snapshot = Snapshot(
        queued=[job(1, "c1", device="cuda"), job(2, device="cuda")],
        devices=devices,
        preparations=[preparation("c1"), preparation("c2")],
    )
    assert actions(snapshot, Start) == [Start("job_2", ("cuda:0",))]
    assert actions(snapshot, Prepare) == [Prepare("c1", 8), Prepare("c2", 4)]


def test_a_limited_number_starts_and_the_others_wait_in_order() -> None:
    names = [f"c{number}" for number in range(1, 8)]
    snapshot = Snapshot(
        queued=[job(number, f"c{number}") for number in range(1, 8)],
        devices=cpu_slots(16),
        preparations=[preparation(name) for name in reversed(names)],
    )
    assert [action.corpus_id for action in actions(snapshot, Prepare)] == names[:MAX_LOCAL]
    waiting = plan(snapshot, NOW).waiting
    assert [waiting[f"job_{number}"].partition(", ")[2] for number in (5, 6, 7)] == [
        f"after {count} others" for count in (4, 5, 6)
    ]


def test_a_cluster_has_its_own_queue() -> None:
    snapshot = Snapshot(
        devices=cpu_slots(1), preparations=[preparation(f"c{number}", launcher="slurm") for number in range(1, 9)]
    )
    assert actions(snapshot, Prepare) == [Prepare(f"c{number}", None) for number in range(1, 9)]


def test_one_that_waits_after_a_crash_is_not_started() -> None:
    waits = preparation("c1", restart_at=NOW + timedelta(seconds=5))
    assert actions(Snapshot(devices=cpu_slots(2), preparations=[waits]), Prepare) == []
    # A back-off is never so long. The clock was set back.
    waits = preparation("c1", restart_at=NOW + timedelta(hours=1))
    assert actions(Snapshot(devices=cpu_slots(2), preparations=[waits]), Prepare) == [Prepare("c1", 2)]


def test_a_live_one_is_inspected_but_not_all_the_time() -> None:
    for ago, expected in ((0.1, 0), (1.0, 1), (-1.0, 1)):
        live = preparation("c1", CorpusStatus.PREPARING, inspected_at=NOW - timedelta(seconds=ago))
        assert len(actions(Snapshot(preparations=[live]), InspectPreparation)) == expected


def test_one_that_nothing_waits_for_is_stopped_then_killed() -> None:
    unwanted = preparation("c1", CorpusStatus.PREPARING, order=None, inspected_at=NOW)
    assert plan(Snapshot(preparations=[unwanted]), NOW).actions == (StopPreparation(unwanted),)
    asked = preparation("c1", CorpusStatus.PREPARING, order=None, inspected_at=NOW, asked_at=NOW - timedelta(seconds=5))
    assert plan(Snapshot(preparations=[asked]), NOW).actions == ()
    late = preparation("c1", CorpusStatus.PREPARING, order=None, inspected_at=NOW, asked_at=NOW - timedelta(seconds=11))
    assert plan(Snapshot(preparations=[late]), NOW).actions == (KillPreparation(late, Reason.USER),)


def test_one_that_is_silent_for_too_long_is_killed() -> None:
    stall = timedelta(seconds=100)
    for silent, expected in ((159, 0), (161, 1)):
        live = preparation(
            "c1", CorpusStatus.PREPARING, inspected_at=NOW, stall=stall, heard_at=NOW - timedelta(seconds=silent)
        )
        assert len(actions(Snapshot(preparations=[live]), KillPreparation)) == expected


@pytest.mark.parametrize("inspected", [None, timedelta(days=2), timedelta(days=-2)])
def test_a_time_that_no_service_observed_is_no_stall(inspected: timedelta | None) -> None:
    """The service was down or suspended, or the clock was changed, while the process continued."""
    live = preparation(
        "c1",
        CorpusStatus.PREPARING,
        inspected_at=NOW - inspected if inspected is not None else None,
        heard_at=NOW - (inspected or timedelta(days=2)),
    )
    assert plan(Snapshot(preparations=[live]), NOW).actions == (InspectPreparation(live),)


def test_jobs_get_the_status_of_their_corpus() -> None:
    moves: dict[tuple[JobStatus, CorpusStatus | None], JobStatus] = {
        (JobStatus.QUEUED, CorpusStatus.PREPARING): JobStatus.PREPARING,
        (JobStatus.PREPARING, CorpusStatus.READY): JobStatus.QUEUED,
        (JobStatus.PREPARING, None): JobStatus.QUEUED,
    }
    for status, corpus in itertools.product((JobStatus.QUEUED, JobStatus.PREPARING), [*CorpusStatus, None]):
        found = actions(Snapshot(waiting_jobs=[WaitingJob("job_1", status, "c1", corpus)]), MoveWaitingJob)
        assert [action.to for action in found] == ([moves[status, corpus]] if (status, corpus) in moves else [])
