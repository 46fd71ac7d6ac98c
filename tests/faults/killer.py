"""Kill at random, from a seed that is printed, and report what was killed and which invariants held."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults import invariants
from tests.faults.invariants import Damage, Sampler
from tests.faults.service_home import Home, Member
from tests.soak_report import SoakReport

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
    """Keeps ``at_once`` jobs going in a home and kills what belongs to them."""

    home: Home
    submit: Callable[[], str]
    seed: int
    at_once: int
    max_wait: float
    damage: Damage
    done: Counter[str] = field(default_factory=Counter)
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
        victims = self.victims(roles)
        if not victims and SERVER not in roles:
            return
        if SERVER in roles:
            self.home.signal(signal.SIGKILL)
        for victim in victims:
            victim.process.send(signal.SIGKILL)
        self.done[chosen] += 1
        if SERVER in roles:
            self.home.wait_down()
            time.sleep(self.dice.choice((0.0, 0.0, 0.2, 1.0)))
            self.slowest_start = max(self.slowest_start, self.home.start())

    def victims(self, roles: tuple[str, ...]) -> list[Member]:
        """Of one job: each agent and torchrun, and one rank or, where everything dies, all of them."""
        living = self.home.processes()
        jobs = sorted({member.job for member in living if member.role in roles})
        if not jobs:
            return []
        job = self.dice.choice(jobs)
        found = [member for member in living if member.job == job and member.role in roles]
        ranks = [member for member in found if member.role == "rank"]
        if roles == ("rank",):
            return [self.dice.choice(ranks)]
        return found

    def finish(self, sampler: Sampler) -> None:
        """Nobody is killed any more: every job comes to its end, and every invariant holds."""
        for job in self.jobs:
            self.keeps_running(job)
            self.home.wait(job, "succeeded", seconds=180)
        invariants.check(self.home, sampler, self.damage)

    def report(self, account: SoakReport, sampler: Sampler) -> None:
        """What was injected, how often, and what held."""
        account.faults.update({f"killed: {what}": count for what, count in self.done.items()})
        account.figure("slowest start of a server, s", self.slowest_start)
        attempts = sum(self.home.job(job)["attempt"] for job in self.jobs)
        account.invariants += [
            f"{len(self.jobs)} jobs, {attempts} attempts, all succeeded; {self.resumed} user resumes",
            f"I1: {sampler.samples} samples of the process table, never two attempts of a job",
            "I2 to I9: no orphan, no metric point missing, every checkpoint valid, weights as of the untouched run",
        ]
