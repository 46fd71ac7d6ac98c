"""How fast runs like this one went on this service."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.spec import JobSpec
from trainyard.service.db.models import JobRow

MAX_RUNS = 300
"""Newest jobs among which a like one is looked for."""

SAME_TRAINING = ("batch_size", "accumulation_steps", "dtype", "use_compile", "deterministic")


@dataclass(frozen=True)
class Throughput:
    """Tokens a second of a past run, and which run that was."""

    tokens_per_second: float
    job_id: str
    name: str
    device_name: str | None

    def __str__(self) -> str:
        where = f" on {self.device_name}" if self.device_name else ""
        return f"{self.tokens_per_second:,.0f} tokens/s in {self.job_id}{where}"


def find_throughput(session: Session, spec: JobSpec, kind: str) -> Throughput | None:
    """Of the newest job with the same shape on the same kind of device; None where there was none.

    The same shape: model, row length, packing, batch, dtype and ranks.
    """
    wanted = _shape(spec.model_dump(mode="json"))
    columns = (JobRow.id, JobRow.name, JobRow.spec, JobRow.facts, JobRow.progress)
    ran = (JobRow.started_at.is_not(None), JobRow.ranks == spec.resources.ranks)
    rows = session.execute(select(*columns).where(*ran).order_by(JobRow.number.desc()).limit(MAX_RUNS))
    for row in rows:
        speed = row.progress.get("tokens_per_second")
        if speed and _kind(row.facts.get("device")) == _kind(kind) and _shape(row.spec) == wanted:
            return Throughput(float(speed), row.id, row.name, row.facts.get("device_name"))
    return None


def _kind(device: str | None) -> str:
    return (device or "").partition(":")[0]


def _shape(spec: dict[str, Any]) -> tuple[Any, ...]:
    data, training = spec["data"], spec["training"]
    return (spec["model"], data["max_seq_len"], data["packing"], *(training[name] for name in SAME_TRAINING))
