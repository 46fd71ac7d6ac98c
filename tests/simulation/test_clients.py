"""Ten clients at once, with random verbs, against a whole service: the answers fit one order of the requests.

Each burst of requests is checked against the lifecycle: there must be an order in which, one by one, each request
gets the answer that it got. Where only one can win, one wins and the others get 409.
"""

import json
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from tests import soak_report
from tests.service.conftest import make_rig, migrated_sqlite, rig, sqlite_url
from tests.service.harness import ServiceHarness, in_threads
from tests.soak_report import SoakReport
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import LIVE, TERMINAL, Desired, JobStatus, Reason, can_transition
from trainyard.service.auth.principal import LOCAL
from trainyard.service.clock import utc_now
from trainyard.service.db.models import EventRow
from trainyard.service.errors import InvalidState
from trainyard.service.jobs import actions, queries, repository
from trainyard.service.jobs.lifecycle import Action, JobState, Rejected, Transition, decide
from trainyard.service.launch.base import AttemptState

__all__ = ["make_rig", "migrated_sqlite", "rig", "sqlite_url"]

CLIENTS = 10
VERBS: tuple[Action, ...] = ("pause", "resume", "cancel", "kill")

Answers = tuple[tuple[Action, int], ...]


def is_serializable(before: JobState, answers: Answers, after: JobState) -> bool:
    """Whether some order of these requests gives each its answer, and the job that there is now."""

    @cache
    def possible(job: JobState, left: Answers) -> bool:
        if not left:
            return (job.status, job.desired) == (after.status, after.desired)
        for verb, status in dict.fromkeys(left):
            followed, expected = expected_result(job, verb)
            rest = list(left)
            rest.remove((verb, status))
            if status == expected and possible(followed, tuple(rest)):
                return True
        return False

    return possible(before, answers)


def expected_result(job: JobState, verb: Action) -> tuple[JobState, int]:
    decision = decide(verb, job)
    if isinstance(decision, Rejected):
        return job, 409
    if isinstance(decision, Transition):
        return replace(job, status=decision.to or job.status, desired=decision.desired, restart_due=False), 202
    return job, 202


class Clients(RuleBasedStateMachine):
    """One service on SQLite, with a fake launcher."""

    template: Path
    account: SoakReport

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="trainyard-clients-"))
        shutil.copy(self.template, self.folder / "trainyard.db")
        self.rig = ServiceHarness(self.folder / "home", f"sqlite:///{self.folder}/trainyard.db")
        self.jobs: list[str] = []
        self.submitted = 0

    @rule(restarts=st.integers(0, 2))
    @precondition(lambda self: self.submitted < 4)
    def submit(self, restarts: int) -> None:
        self.submitted += 1
        self.jobs.append(self.rig.submit(resources={"device": "cpu", "max_restarts": restarts}))

    @rule(which=st.integers(0, 2), verbs=st.lists(st.sampled_from(VERBS), min_size=2, max_size=CLIENTS))
    @precondition(lambda self: self.submitted)
    def all_at_once(self, which: int, verbs: list[Action]) -> None:
        if not self.jobs:
            return  # who was deleted hangs on races, and which rules there are must not
        job_id = self.jobs[which % len(self.jobs)]
        before = self.job_state(job_id)
        self.account.faults["requests in bursts of up to ten clients"] += len(verbs)
        answers = in_threads(len(verbs), lambda i: self.rig.client.post(f"/jobs/{job_id}/{verbs[i]}"))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) <= {202, 409}, [answer.text for answer in answers]
        outcomes = tuple(sorted(zip(verbs, statuses, strict=True)))
        after = self.job_state(job_id)
        assert is_serializable(before, outcomes, after), f"{before} {outcomes} {after}"

    @rule(which=st.integers(0, 2))
    @precondition(lambda self: self.submitted)
    def delete_by_all(self, which: int) -> None:
        if not self.jobs:
            return  # who was deleted hangs on races, and which rules there are must not
        job_id = self.jobs[which % len(self.jobs)]
        ended = self.rig.status(job_id) in TERMINAL
        answers = in_threads(CLIENTS, lambda _: self.rig.client.delete(f"/jobs/{job_id}"))
        outcomes = Counter(answer.status_code for answer in answers)
        assert outcomes == ({204: 1, 404: CLIENTS - 1} if ended else {409: CLIENTS}), "one winner"
        if ended:
            self.jobs.remove(job_id)

    @rule()
    def schedule(self) -> None:
        self.rig.reconcile()

    @rule(seconds=st.sampled_from([1, 6, 30, 120]))
    def time_passes(self, seconds: float) -> None:
        self.rig.clock.forward(seconds)

    @rule()
    def agents_send_heartbeats(self) -> None:
        for attempt in self.alive():
            if not attempt.lines:
                attempt.started()
            self.rig.ship(attempt)

    @rule(
        end=st.sampled_from(
            [("completed", None), ("stopped", Reason.USER), ("crashed", Reason.UNKNOWN), ("failed", Reason.DIVERGED)]
        ),
        verb=st.sampled_from(VERBS),
    )
    def one_ends_while_it_is_asked(self, end: tuple[Any, Reason | None], verb: Action) -> None:
        """Finish against cancel: whichever is first, the other gets the right answer."""
        for attempt in self.alive()[:1]:
            job_id = attempt.launch.name.job_id
            if attempt.lines:
                self.rig.ship(attempt)
            report = attempt.end(*end).model_dump(mode="json")

            def either(number: int, attempt: Any = attempt, report: Any = report, job_id: str = job_id) -> int:
                if number:
                    return int(self.rig.client.post(f"/jobs/{job_id}/{verb}").status_code)
                return int(self.rig.report(attempt, "exit", report).status_code)

            exit_status, asked = in_threads(2, either)
            self.account.faults[f"end against {verb}"] += 1
            assert exit_status == 200
            assert asked in (202, 404, 409), asked
            if end[0] == "completed" and job_id in self.jobs and attempt.launch.name.number == self.attempt(job_id):
                assert self.rig.status(job_id) is JobStatus.SUCCEEDED, "what was done is done"

    @invariant()
    def event_logs_are_paths_of_the_table(self) -> None:
        for job_id in getattr(self, "jobs", []):
            walked = [JobStatus.QUEUED]
            for data in self.changes(job_id):
                assert data["from"] == walked[-1]
                walked.append(JobStatus(data["to"]))
                assert can_transition(walked[-2], walked[-1]), walked
            assert walked[-1] is self.rig.status(job_id)

    @invariant()
    def at_most_one_attempt_lives_and_only_of_a_live_job(self) -> None:
        for job_id in getattr(self, "jobs", []):
            living = self.rig.launcher.living(job_id)
            assert len(living) <= 1
            assert not living or self.rig.status(job_id) in LIVE

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def alive(self) -> list[Any]:
        return [attempt for attempt in self.rig.launcher.attempts.values() if attempt.state is AttemptState.ALIVE]

    def attempt(self, job_id: str) -> int:
        return int(self.rig.job(job_id)["attempt"])

    def job_state(self, job_id: str) -> JobState:
        with self.rig.database.read() as session:
            return queries.job_state(repository.find(session, job_id))

    def changes(self, job_id: str) -> list[dict[str, Any]]:
        log = select(EventRow.data).where(EventRow.job_id == job_id, EventRow.kind == "status")
        with self.rig.database.read() as session:
            return list(session.scalars(log.order_by(EventRow.number)))


@pytest.mark.parametrize(("examples", "steps"), [(8, 12), pytest.param(400, 40, marks=pytest.mark.soak)])
@pytest.mark.timeout(3600)
def test_ten_clients(migrated_sqlite: Path, account: SoakReport, examples: int, steps: int) -> None:
    Clients.template, Clients.account = migrated_sqlite, account
    run_state_machine_as_test(
        seed(soak_report.seed())(Clients),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=examples < 100,
            suppress_health_check=list(HealthCheck),
        ),
    )
    account.invariants.append(
        "each burst of answers fits one order of its requests; every event log is a path of the table"
    )


def test_an_order_is_found_only_where_there_is_one() -> None:
    running = JobState(JobStatus.RUNNING, Desired.RUN, attempts=1)
    pausing = JobState(JobStatus.PAUSING, Desired.PAUSE, attempts=1)
    cancelling = JobState(JobStatus.CANCELLING, Desired.CANCEL, attempts=1)
    assert is_serializable(running, (("cancel", 202), ("pause", 202)), cancelling)
    assert is_serializable(running, (("cancel", 202), ("pause", 409)), cancelling)
    assert not is_serializable(running, (("cancel", 202), ("pause", 202)), pausing), "a cancel is not taken back"
    assert not is_serializable(running, (("pause", 409),), running)


def test_two_resumes_that_both_found_it_paused(rig: ServiceHarness) -> None:
    """Each looks first and writes later: the second one's write comes upon a job that is queued already."""
    job_id, attempt = rig.running()
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", Reason.USER, step=3)
    with rig.database.read() as session:
        before = repository.find(session, job_id).spec
    spec = JobSpec.model_validate_json(json.dumps(before))
    for _ in range(2):
        with rig.database.write() as session:
            job = actions.resume(session, job_id, before, spec, None, LOCAL, utc_now())
            assert job.status == JobStatus.QUEUED
    resumed = [event for event in rig.data(job_id, "events") if event["data"].get("to") == "queued"]
    assert len(resumed) == 2, "submitted, and resumed once"
    with rig.database.write() as session, pytest.raises(InvalidState):
        actions.resume(session, job_id, before, spec.model_copy(update={"name": "another"}), None, LOCAL, utc_now())
