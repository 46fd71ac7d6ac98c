"""Ingest of metric points into SQLite while the service is killed repeatedly: points a second, and points lost."""

import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from sqlalchemy import func, select

from benchmarks.load import live
from benchmarks.load.live import Agent
from benchmarks.load.tables import Figure
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import Served, served
from trainyard.service.db.models import MetricRow

AGENTS = 10
PER_SECOND = 1_000
KILLS = 20
BEAT_SECONDS = 0.25
SEED = 1


def measure() -> Iterator[Figure]:
    """Ten agents produce a hundred points a second each, whether the service is up or not."""
    with live.home_with_jobs(AGENTS) as (home, agents):
        threads = Agents(agents)
        downtime, produced, stored_in, spent = threads.run(home)
        with live.database(home) as database, database.read() as session:
            stored = session.scalar(select(func.count()).select_from(MetricRow)) or 0
            steps = select(func.max(MetricRow.step)).group_by(MetricRow.job_id)
            reached = sum(session.scalars(steps))
    yield Figure(
        f"points stored over {KILLS} kills, SQLite", stored / stored_in, "/s", PER_SECOND * 0.99, is_limit=False
    )
    yield Figure("points lost", produced - stored + abs(stored - reached), "", 0.5)
    yield Figure("the service was away, in all", downtime, "s")
    yield Figure("CPU of the service a thousand points", 1000 * spent / (stored / 1000), "ms")


class Agents:
    """The agents, one thread each; they follow the service to its current URL."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        self.agents = agents
        self.url: str | None = None
        self.producing = True
        self.threads = [threading.Thread(target=self._work, args=(agent,)) for agent in agents]

    def run(self, home: Path) -> tuple[float, int, float, float]:
        """Return (seconds without a service, points produced, seconds until all were stored, CPU seconds)."""
        dice, downtime, spent = random.Random(SEED), 0.0, 0.0
        began = time.monotonic()
        for number in range(KILLS + 1):
            down = time.monotonic()
            # Without a scheduler: it would end attempts that have no processes.
            with served(home, home.parent, arguments=["--no-scheduler"]) as service:
                downtime += time.monotonic() - down if number else 0.0
                self.url = service.url
                if not number:
                    began = time.monotonic()
                    self._begin()
                if number < KILLS:
                    time.sleep(dice.uniform(1.0, 4.0))
                    spent += self._kill(service)
                else:
                    self._finish()
                    spent += service.cpu_seconds
        return downtime, sum(len(agent.outbox) for agent in self.agents), time.monotonic() - began, spent

    def _begin(self) -> None:
        for thread in self.threads:
            thread.start()

    def _kill(self, service: Served) -> float:
        spent = service.cpu_seconds
        self.url = None
        service.process.send_signal(signal.SIGKILL)
        service.process.wait()
        return spent

    def _finish(self) -> None:
        self.producing = False
        for thread in self.threads:
            thread.join()

    def _work(self, agent: Agent) -> None:
        due = time.monotonic()
        while self.producing or agent.acked < len(agent.outbox):
            while self.producing and due <= time.monotonic():
                agent.metric()
                due += len(self.agents) / PER_SECOND
            if self.url is not None:
                # After a kill, lines that were not acknowledged are sent again.
                with suppress(OSError), Wire(self.url, agent.token) as wire:
                    agent.upload(wire)
            if agent.acked >= len(agent.outbox) - 50:
                time.sleep(BEAT_SECONDS)
