"""Running attempts in the database, and agents that report for them, all without processes."""

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.load.wire_bytes import Wire
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import JobStatus
from trainyard.service.auth.principal import LOCAL
from trainyard.service.db.engine import Database
from trainyard.service.db.models import AttemptRow
from trainyard.service.ids import new_id, token_hash
from trainyard.service.jobs import repository


@dataclass
class Agent:
    """Reports for one attempt. ``outbox`` has every line; the first ``acked`` are stored."""

    job_id: str
    attempt_id: str
    token: str
    outbox: list[dict[str, Any]] = field(default_factory=list)
    acked: int = 0

    def metric(self) -> None:
        step = len(self.outbox) + 1
        point = {"step": step, "epoch": 0.0, "loss": 2.0, "learning_rate": 1e-3, "tokens": step, "grad_norm": 1.0}
        line = {"kind": "metric", "seq": step, "at": datetime.now(UTC).isoformat(), "nonfinite": False}
        self.outbox.append({**line, **point})

    def upload(self, wire: Wire, limit: int = 500) -> None:
        """Send lines that are not stored yet. Raises OSError if the service is down."""
        lines = self.outbox[self.acked : self.acked + limit]
        if lines:
            answer = wire.json("POST", f"/internal/attempts/{self.attempt_id}/events", {"events": lines})
            self.acked = int(answer["acked"])


@contextmanager
def database(home: Path) -> Iterator[Database]:
    """Open the home's SQLite database, with its tables."""
    home.mkdir(parents=True, exist_ok=True)
    opened = Database(f"sqlite:///{home}/trainyard.db")
    opened.upgrade(home / "migrate.lock")
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def home_with_jobs(count: int) -> Iterator[tuple[Path, list[Agent]]]:
    """Yield a temporary home next to a ``corpus.jsonl``, with ``count`` running jobs, and their agents."""
    with tempfile.TemporaryDirectory() as folder:
        home, corpus = Path(folder) / "home", Path(folder) / "corpus.jsonl"
        corpus.write_text('{"text": "one"}\n')
        with database(home) as opened:
            agents = _running_jobs(opened, corpus, count)
        yield home, agents


def _running_jobs(database: Database, corpus: Path, count: int) -> list[Agent]:
    spec = JobSpec.model_validate({"data": {"data_path": str(corpus)}, "resources": {"device": "cpu"}})
    now = datetime.now(UTC)
    agents = []
    for number in range(count):
        agent = Agent("", new_id("att", 16), secrets.token_urlsafe(32))
        with database.write() as session:
            job = repository.create(session, spec, {}, [], LOCAL, now)
            agent.job_id = job.id
            session.add(
                AttemptRow(
                    id=agent.attempt_id,
                    job_id=job.id,
                    number=1,
                    token_sha256=token_hash(agent.token),
                    trigger="submit",
                    devices=[f"cpu:{number}"],
                    created_at=now,
                    launched_at=now,
                )
            )
            job.attempt, job.status, job.started_at, job.heard_at = 1, JobStatus.RUNNING, now, now
        agents.append(agent)
    return agents
