"""Users, agents, deaths and restarts in any order. After each step the invariants hold.

The seed of a failure is in the test's name; the operations that led to it are printed.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.launcher import FakeAttempt, ServiceKilled
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.contract.status import (
    LIVE,
    TERMINAL,
    JobStatus,
    Reason,
    can_transition,
)
from trainyard.service.launch.base import AttemptState

VERBS = ("pause", "resume", "cancel", "kill")
ENDS: tuple[tuple[Any, Reason | None], ...] = (
    ("completed", None),
    ("stopped", Reason.USER),
    ("failed", Reason.DIVERGED),
    ("crashed", Reason.WORKER_CRASHED),
    ("crashed", Reason.UNKNOWN),
    ("killed", Reason.USER),
)


class Chaos:
    """A service and a die. Each method is one thing that may happen."""

    def __init__(self, rig: ServiceHarness, seed: int) -> None:
        self.rig = rig
        self.dice = random.Random(seed)
        self.jobs: list[str] = []
        self.completed: set[str] = set()
        self.happened: list[str] = []

    def step(self) -> None:
        doings: list[tuple[int, Callable[[], None]]] = [
            (2, self.submit),
            (6, self.act),
            (1, self.delete),
            (6, self.schedule),
            (6, self.agent_speaks),
            (4, self.agent_ends),
            (1, self.agent_is_lost),
            (2, self.time_passes),
            (1, self.service_dies),
            (1, self.service_dies_in_a_launch),
        ]
        weights = [weight for weight, _ in doings]
        doing = self.dice.choices([d for _, d in doings], weights)[0]
        self.happened.append(doing.__name__)
        doing()

    def submit(self) -> None:
        if len(self.jobs) < 6:
            ranks = self.dice.randrange(1, 3)
            self.jobs.append(self.rig.submit(resources={"nproc_per_node": ranks, "max_restarts": 2}))

    def act(self) -> None:
        for job_id in self._some(self.jobs):
            verb = self.dice.choice(VERBS)
            before = self.rig.job(job_id)
            allowed = {a["action"]: a["allowed"] for a in before["allowed_actions"]}[verb]
            answer = self.rig.client.post(f"/jobs/{job_id}/{verb}")
            assert answer.status_code == (202 if allowed else 409), (verb, before["status"], answer.text[:300])

    def delete(self) -> None:
        for job_id in self._some(self.jobs):
            ended = self.rig.status(job_id) in TERMINAL
            answer = self.rig.client.delete(f"/jobs/{job_id}")
            assert answer.status_code == (204 if ended else 409)
            if ended:
                self.jobs.remove(job_id)

    def schedule(self) -> None:
        self.rig.reconcile()

    def agent_speaks(self) -> None:
        for attempt in self._some(self._alive()):
            if not attempt.lines:
                attempt.started(steps=1000)
            last = max((line["step"] for line in attempt.lines if line["kind"] == "metric"), default=0)
            attempt.metric(last + 1)
            self.rig.ship(attempt, attempt.lines[self.dice.randrange(len(attempt.lines)) :])

    def agent_ends(self) -> None:
        for attempt in self._some(self._alive()):
            outcome, reason = self.dice.choice(ENDS)
            if outcome == "completed":
                self.completed.add(attempt.launch.name.job_id)
            if self.dice.random() < 0.5:
                attempt.end(outcome, reason, step=3)  # the report never arrives; it is on the disk
            else:
                self.rig.exit(attempt, outcome, reason, step=3)

    def agent_is_lost(self) -> None:
        for attempt in self._some(self._alive()):
            attempt.lose_agent()

    def time_passes(self) -> None:
        self.rig.clock.forward(self.dice.choice((1, 6, 30, 120)))

    def service_dies(self) -> None:
        self.rig = self.rig.restart()

    def service_dies_in_a_launch(self) -> None:
        self.rig.launcher.fail_next = self.dice.choice(("before_spawn", "after_spawn", "refuse"))
        try:
            self.rig.reconcile()
        except ServiceKilled:
            self.rig = self.rig.restart()
        self.rig.launcher.fail_next = None

    def check(self) -> None:
        launcher = self.rig.launcher
        leased = [d["job_id"] for d in self.rig.get("/devices")["data"] if d["job_id"]]
        for job in self.rig.get("/jobs", limit=100)["data"]:
            job_id, status = job["id"], JobStatus(job["status"])
            assert len(launcher.living(job_id)) <= 1, "I1: one live attempt at most"
            if launcher.living(job_id):
                assert status in LIVE, f"I2: it lives and the job is {status}"
            ranks = job["spec"]["resources"]["nproc_per_node"]
            assert leased.count(job_id) == (ranks if status in LIVE else 0), "I3"
            if status is JobStatus.SUCCEEDED:
                assert job_id in self.completed, "I9"
            assert (job["finished_at"] is not None) == (status in TERMINAL)
            assert (job["queue"] is not None) == (status is JobStatus.QUEUED)
            self._check_path(job_id, status)
            steps = [m["step"] for m in self.rig.data(job_id, "metrics")]
            assert steps == sorted(set(steps)), "I4: each step once"

    def _check_path(self, job_id: str, status: JobStatus) -> None:
        walked = [JobStatus.QUEUED]
        for event in self.rig.data(job_id, "events"):
            if event["kind"] == "status":
                assert event["data"]["from"] == walked[-1], "I5: no change without its event"
                walked.append(JobStatus(event["data"]["to"]))
                assert can_transition(walked[-2], walked[-1]), "I5"
        if len(walked) < 50:  # a page of events is 100
            assert walked[-1] is status

    def finish(self) -> None:
        """Let everything come to rest: no job is stuck."""
        for _ in range(12):
            for attempt in self._alive():
                self.rig.exit(attempt, "completed", step=10)
                self.completed.add(attempt.launch.name.job_id)
            self.rig.clock.forward(130)
            self.rig.reconcile()
        resting = {JobStatus.PAUSED, JobStatus.INTERRUPTED, *TERMINAL}
        for job in self.rig.get("/jobs", limit=100)["data"]:
            assert JobStatus(job["status"]) in resting, (job["id"], job["summary"])
        assert all(d["job_id"] is None for d in self.rig.get("/devices")["data"])

    def _alive(self) -> list[FakeAttempt]:
        return [a for a in self.rig.launcher.attempts.values() if a.state is AttemptState.ALIVE]

    def _some(self, of: list[Any]) -> list[Any]:
        return [self.dice.choice(of)] if of else []


@pytest.mark.parametrize("seed", range(5))
def test_chaos(make_rig: MakeHarness, sqlite_url: str, seed: int) -> None:
    _run(make_rig(sqlite_url), seed, steps=80)


@pytest.mark.parametrize("any_url", ["postgres"], indirect=True)
def test_chaos_on_postgres(make_rig: MakeHarness, any_url: str) -> None:
    _run(make_rig(any_url), seed=99, steps=60)


def _run(rig: ServiceHarness, seed: int, steps: int) -> None:
    chaos = Chaos(rig, seed)
    try:
        for _ in range(steps):
            chaos.step()
            chaos.check()
        chaos.finish()
    except AssertionError:
        print(f"seed {seed}: {' '.join(chaos.happened)}")
        raise
    finally:
        chaos.rig.close()
