"""Throughput of earlier runs of this service with the shape of the planned one."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.spec import JobSpec
from trainyard.service.db.models import JobRow

MAX_RUNS = 300  # number of newest jobs that are searched
SAME_TRAINING = (
    "batch_size",
    "accumulation_steps",
    "dtype",
    "use_compile",
    "compile_mode",
    "allow_tf32",
    "deterministic",
)


@dataclass(frozen=True)
class Throughput:
    """Tokens per second of an earlier run."""

    tokens_per_second: float
    job_id: str
    name: str
    device_name: str | None

    def __str__(self) -> str:
        suffix = f" on {self.device_name}" if self.device_name else ""
        return f"{self.tokens_per_second:,.0f} tokens/s in {self.job_id}{suffix}"


def find_throughput(session: Session, spec: JobSpec, kind: str) -> Throughput | None:
    """Return the throughput of the newest job with the same shape on the same kind of device, or None.

    The shape is the model, sequence length, packing, the settings `SAME_TRAINING`, parallelism, gradient checkpointing
    and number of ranks.
    """
    shape = _shape(spec.model_dump(mode="json"))
    columns = (JobRow.id, JobRow.name, JobRow.spec, JobRow.facts, JobRow.progress)
    conditions = (JobRow.started_at.is_not(None), JobRow.ranks == spec.resources.ranks)
    rows = session.execute(select(*columns).where(*conditions).order_by(JobRow.number.desc()).limit(MAX_RUNS))
    for row in rows:
        speed = row.progress.get("tokens_per_second")
        if speed and _kind(row.facts.get("device")) == _kind(kind) and _shape(row.spec) == shape:
            return Throughput(float(speed), row.id, row.name, row.facts.get("device_name"))
    return None


def _kind(device: str | None) -> str:
    return (device or "").partition(":")[0]


def _shape(spec: dict[str, Any]) -> tuple[Any, ...]:
    data, training = spec["data"], spec["training"]
    # Jobs of older versions do not have these two.
    memory = training.get("gradient_checkpointing", False), spec["resources"].get("parallelism", "ddp")
    return (spec["model"], data["max_seq_len"], data["packing"], *(training[name] for name in SAME_TRAINING), *memory)
