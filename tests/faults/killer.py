"""Kill at random, from a seed that is printed, and report what was killed, at which point, and what held."""

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2

from tests.faults import invariants
from tests.faults.invariants import Damage, Sampler
from tests.faults.service_home import Home, Member, telling
from tests.soak_report import SoakReport
from trainyard.contract.rundir import SAVING_PREFIX

SERVER = "server"
TARGETS: dict[str, tuple[int, tuple[str, ...]]] = {
    "server": (3, (SERVER,)),
    "agent": (2, ("agent",)),
    "torchrun": (2, ("torchrun",)),
    "rank": (3, ("rank",)),
    "agent and torchrun": (1, ("agent", "torchrun")),
    "server and agent": (1, (SERVER, "agent")),
    "everything": (1, (SERVER, "agent", "torchrun", "rank")),
}
"""What dies together, and how often that is chosen."""

CHECK_EVERY = 25
LONGEST_WAIT = 60.0
STALLED_SECONDS = 300.0
"""A job is stuck if nothing about it has changed for so long, on however busy a host."""


@dataclass
class Killer:
    """Keeps ``at_once`` jobs going in a home and kills what belongs to them. ``done`` counts (victims, point).

    ``max_wait``: longest wait until a kill at a random time, in seconds. ``max_steps``: most steps until a kill at a
    random step.
    """

    home: Home
    submit: Callable[[], str]
    seed: int
    at_once: int
    max_wait: float
    max_steps: int
    damage: Damage
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    jobs: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    slowest_start: float = 0.0
    resumed: int = 0
    verified: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def run(self, kills: int, seconds: float, sampler: Sampler) -> None:
        """``kills`` of them, or as many as fit into ``seconds``."""
        began = time.monotonic()
        self.home.start()
        while sum(self.done.values()) < kills and time.monotonic() < began + seconds:
            self.keep_busy()
            self.wait_for_point()
            self.kill_something()
            if sum(self.done.values()) % CHECK_EVERY == 0:
                assert sampler.found == []
        self.finish(sampler)
        self.seconds = time.monotonic() - began

    def wait_for_point(self) -> None:
        """Wait for a random time, for a random step of an attempt, or for a save.

        With times alone a busy host would be killed before its first step again and again.
        """
        match self.dice.choices(("time", "step", "save"), (4, 4, 2))[0]:
            case "time":
                time.sleep(self.dice.uniform(0, self.max_wait))
            case "step":
                until_step = self.dice.randint(1, self.max_steps)
                first_steps = self.newest_steps()
                self.wait_while_live(lambda: self.has_made(until_step, first_steps))
            case "save":
                self.wait_while_live(lambda: any(self.is_saving(*attempt) for attempt in self.newest_attempts()))

    def wait_while_live(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition``, or until an attempt that is live now has ended, for LONGEST_WAIT at most."""
        deadline = time.monotonic() + LONGEST_WAIT
        reports = [self.home.run(job).attempt(number).exit for job, number in self.newest_attempts()]
        reports = [report for report in reports if not report.exists()]
        while time.monotonic() < deadline and not condition() and not any(report.exists() for report in reports):
            time.sleep(0.02)

    def newest_attempts(self) -> list[tuple[str, int]]:
        """Return (job, attempt) of the running jobs, as their run directories have it."""
        found = []
        for job in self.running:
            with contextlib.suppress(FileNotFoundError, ValueError):
                found.append((job, int(self.home.run(job).current.read_text())))
        return found

    def newest_steps(self) -> dict[tuple[str, int], int]:
        """Return the step of each attempt that has made one."""
        steps = {name: self.home.run(name[0]).attempt(name[1]).read_step() for name in self.newest_attempts()}
        return {name: step for name, step in steps.items() if step is not None}

    def has_made(self, steps: int, first_steps: dict[tuple[str, int], int]) -> bool:
        """Whether an attempt has made ``steps`` more; ``first_steps``, where each was seen first, is extended."""
        newest = self.newest_steps()
        return any(step >= first_steps.setdefault(name, step) + steps - 1 for name, step in newest.items())

    def keep_busy(self) -> None:
        self.running = [job for job in self.running if self.keeps_running(job)]
        fresh = [self.submit() for _ in range(self.at_once - len(self.running))]
        self.running += fresh
        self.jobs += fresh

    def keeps_running(self, job_id: str) -> bool:
        """False if the job has succeeded. One that was killed twice before it made a step is resumed by its user."""
        job = self.home.job(job_id)
        if job["status"] == "failed":
            assert "made no step" in job["message"], f"{job_id} has failed: {job['message']}"
            self.resumed += self.home.post(f"/jobs/{job_id}/resume").status_code == 202
        return bool(job["status"] != "succeeded")

    def kill_something(self) -> None:
        chosen = self.dice.choices(list(TARGETS), [weight for weight, _ in TARGETS.values()])[0]
        roles = TARGETS[chosen][1]
        living = self.home.processes()
        victims = self.victims(living, roles)
        if not victims and SERVER not in roles:
            return
        point = self.point_of(next(iter(victims or living), None))
        if SERVER in roles:
            self.home.signal(signal.SIGKILL)
        for victim in victims:
            victim.process.send(signal.SIGKILL)
        self.done[chosen, point] += 1
        if SERVER in roles:
            self.home.wait_down()
            time.sleep(self.dice.choice((0.0, 0.0, 0.2, 1.0)))
            self.slowest_start = max(self.slowest_start, self.home.start())

    def victims(self, living: list[Member], roles: tuple[str, ...]) -> list[Member]:
        """Of one job: each agent and torchrun, and one rank or, where everything dies, all of them."""
        jobs = sorted({member.job for member in living if member.role in roles})
        if not jobs:
            return []
        job = self.dice.choice(jobs)
        found = [member for member in living if member.job == job and member.role in roles]
        ranks = [member for member in found if member.role == "rank"]
        if roles == ("rank",):
            return [self.dice.choice(ranks)]
        return found

    def point_of(self, member: Member | None) -> str:
        """Return how far the member's attempt is, from its files."""
        if member is None:
            return "no attempt live"
        run = self.home.run(member.job)
        attempt = run.attempt(member.number)
        if attempt.outcome.exists():
            return "at the end of the run"
        if attempt.read_step() is None:
            return "before the first step"
        return "in a save" if self.is_saving(member.job, member.number) else "in training"

    def is_saving(self, job: str, number: int) -> bool:
        run = self.home.run(job)
        with contextlib.suppress(OSError):
            # What an earlier attempt has left of a save is older than this attempt.
            began = run.attempt(number).started.stat().st_mtime
            partial = run.artifacts(None).checkpoint(0).parent.glob(f"{SAVING_PREFIX}*")
            return any(folder.stat().st_mtime >= began for folder in partial)
        return False

    def finish(self, sampler: Sampler) -> None:
        """Kill nothing any more: every job succeeds, and every invariant holds."""
        for job in self.jobs:
            self.wait_for_success(job)
        invariants.check(self.home, sampler, self.damage)
        self.verified = invariants.check_alarms(self.home)

    def wait_for_success(self, job_id: str) -> None:
        """Raise AssertionError if nothing about the job changes for STALLED_SECONDS: a busy host may take any time."""
        seen: dict[str, object] = {}
        changed = time.monotonic()
        with telling(lambda: f"{seen}\n{self.home.log()[-3000:]}"):
            while self.keeps_running(job_id):
                job = self.home.job(job_id)
                if job != seen:
                    seen, changed = job, time.monotonic()
                assert time.monotonic() < changed + STALLED_SECONDS, f"{job_id} is stuck, {job['status']}"
                time.sleep(0.2)


@dataclass
class KillTotals:
    """The sum over several killers, each in a home of its own. ``done`` counts (part, victims, point)."""

    done: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    jobs: int = 0
    attempts: int = 0
    resumed: int = 0
    samples: int = 0
    verified: int = 0
    starts: list[float] = field(default_factory=list)
    kill_seconds: dict[str, list[float]] = field(default_factory=dict)
    _adding: threading.Lock = field(default_factory=threading.Lock)

    def add(self, part: str, killer: Killer, sampler: Sampler) -> None:
        """Add what a killer has done, also after a failure. Several threads may call it."""
        with self._adding:
            self._add(part, killer, sampler)

    def _add(self, part: str, killer: Killer, sampler: Sampler) -> None:
        self.done.update({(part, *key): count for key, count in killer.done.items()})
        self.jobs += len(killer.jobs)
        self.resumed += killer.resumed
        self.verified += killer.verified
        if killer.seconds:
            self.kill_seconds.setdefault(part, []).append(killer.seconds / max(1, sum(killer.done.values())))
        self.samples += sampler.samples
        self.starts.append(killer.slowest_start)
        # After a failure the service may be down.
        with contextlib.suppress(httpx2.TransportError, TypeError, KeyError):
            self.attempts += sum(killer.home.job(job)["attempt"] for job in killer.jobs)

    def write(self, account: SoakReport) -> None:
        """What was injected, where and how often, and what held."""
        for (part, victims, point), count in self.done.items():
            account.faults[f"{part}: killed {victims}, {point}"] += count
        for slowest in self.starts:
            account.figure("slowest start of a server, s", slowest)
        for part, seconds in self.kill_seconds.items():
            account.figures[f"{part}: seconds a kill in one home"] = seconds
        kills = sum(self.done.values())
        account.invariants += [
            f"{kills:,} kills, {self.jobs:,} jobs in {self.attempts:,} attempts, all succeeded",
            f"{self.resumed} times a job that was killed twice before its first step was resumed by its user",
            f"I1: {self.samples:,} samples of the process table, never two attempts of a job",
            "I2 to I9: no orphan, no metric point missing, every checkpoint valid, weights as of the untouched run",
            f"I10: no damage reported; {self.verified} resumed attempts compared their weights, with a difference of 0",
        ]
