"""Kill at random, from a seed that is printed, and report what was killed, at which point, and what held."""

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2

from tests.faults import invariants
from tests.faults.invariants import Damage, Sampler
from tests.faults.service_home import Home, Member
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


@dataclass
class Killer:
    """Keeps ``at_once`` jobs going in a home and kills what belongs to them. ``done`` counts (victims, point)."""

    home: Home
    submit: Callable[[], str]
    seed: int
    at_once: int
    max_wait: float
    damage: Damage
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    jobs: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    slowest_start: float = 0.0
    resumed: int = 0

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def run(self, kills: int, seconds: float, sampler: Sampler) -> None:
        """``kills`` of them, or as many as fit into ``seconds``."""
        deadline = time.monotonic() + seconds
        self.home.start()
        while sum(self.done.values()) < kills and time.monotonic() < deadline:
            self.keep_busy()
            time.sleep(self.dice.uniform(0, self.max_wait))
            self.kill_something()
            if sum(self.done.values()) % CHECK_EVERY == 0:
                assert sampler.found == []
        self.finish(sampler)

    def keep_busy(self) -> None:
        self.running = [job for job in self.running if self.keeps_running(job)]
        fresh = [self.submit() for _ in range(self.at_once - len(self.running))]
        self.running += fresh
        self.jobs += fresh

    def keeps_running(self, job_id: str) -> bool:
        """False where the job has succeeded. One that was killed twice before it made a step is resumed by its user."""
        job = self.home.job(job_id)
        if job["status"] == "failed" and "made no step" in job["message"]:
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
        with contextlib.suppress(OSError):
            # What an earlier attempt has left of a save is older than this attempt.
            began = attempt.started.stat().st_mtime
            partial = run.artifacts(None).checkpoint(0).parent.glob(f"{SAVING_PREFIX}*")
            if any(folder.stat().st_mtime >= began for folder in partial):
                return "in a save"
        return "in training"

    def finish(self, sampler: Sampler) -> None:
        """Nobody is killed any more: every job comes to its end, and every invariant holds."""
        for job in self.jobs:
            self.keeps_running(job)
            self.home.wait(job, "succeeded", seconds=180)
        invariants.check(self.home, sampler, self.damage)


@dataclass
class KillTotals:
    """The sum over several killers, each in a home of its own. ``done`` counts (part, victims, point)."""

    done: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    jobs: int = 0
    attempts: int = 0
    resumed: int = 0
    samples: int = 0
    starts: list[float] = field(default_factory=list)

    def add(self, part: str, killer: Killer, sampler: Sampler) -> None:
        self.done.update({(part, *key): count for key, count in killer.done.items()})
        self.jobs += len(killer.jobs)
        self.resumed += killer.resumed
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
        kills = sum(self.done.values())
        account.invariants += [
            f"{kills:,} kills, {self.jobs:,} jobs in {self.attempts:,} attempts, all succeeded",
            f"{self.resumed} times a job that was killed twice before its first step was resumed by its user",
            f"I1: {self.samples:,} samples of the process table, never two attempts of a job",
            "I2 to I9: no orphan, no metric point missing, every checkpoint valid, weights as of the untouched run",
        ]
