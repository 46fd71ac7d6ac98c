"""Metric points into SQLite while the service is killed again and again: how many a second, and whether any is lost."""

import random
import signal
import tempfile
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
    """Ten agents make a hundred points a second each, whether somebody takes them or not."""
    with tempfile.TemporaryDirectory() as folder:
        home, corpus = Path(folder) / "home", Path(folder) / "corpus.jsonl"
        corpus.write_text('{"text": "one"}\n')
        with live.database(home) as made:
            agents = live.running(made, corpus, AGENTS)
        crew = Crew(agents)
        away, made_points, stored_in, spent = crew.through(home, Path(folder))
        with live.database(home) as made, made.read() as session:
            stored = session.scalar(select(func.count()).select_from(MetricRow)) or 0
            steps = select(func.max(MetricRow.step)).group_by(MetricRow.job_id)
            reached = sum(session.scalars(steps))
    yield Figure(f"points stored over {KILLS} kills, SQLite", stored / stored_in, "/s", PER_SECOND * 0.99, most=False)
    yield Figure("points lost", made_points - stored + abs(stored - reached), "", 0.5)
    yield Figure("the service was away, in all", away, "s")
    yield Figure("CPU of the service a thousand points", 1000 * spent / (stored / 1000), "ms")


class Crew:
    """The agents, each a thread; they find the service where it is now."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        self.agents = agents
        self.url: str | None = None
        self.making = True
        self.threads = [threading.Thread(target=self._work, args=(agent,)) for agent in agents]

    def through(self, home: Path, root: Path) -> tuple[float, int, float, float]:
        """(seconds without a service, points made, seconds until all were stored, CPU seconds of the services)."""
        dice, away, spent = random.Random(SEED), 0.0, 0.0
        began = time.monotonic()
        for number in range(KILLS + 1):
            down = time.monotonic()
            # One that does not schedule leaves attempts alone that have no processes.
            with served(home, root, arguments=["--no-scheduler"]) as service:
                away += time.monotonic() - down if number else 0.0
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
        return away, sum(len(agent.outbox) for agent in self.agents), time.monotonic() - began, spent

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
        self.making = False
        for thread in self.threads:
            thread.join()

    def _work(self, agent: Agent) -> None:
        due = time.monotonic()
        while self.making or agent.acked < len(agent.outbox):
            while self.making and due <= time.monotonic():
                agent.metric()
                due += len(self.agents) / PER_SECOND
            if self.url is not None:
                # Killed in the middle: what was not acknowledged is sent again.
                with suppress(OSError), Wire(self.url, agent.token) as wire:
                    agent.ship(wire)
            if agent.acked >= len(agent.outbox) - 50:
                time.sleep(BEAT_SECONDS)
