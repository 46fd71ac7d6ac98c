"""The route that previews a run without storing anything."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from trainyard.contract.parsing import Problem, pointer_to
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import JobStatus
from trainyard.model import costs
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import SPEC_BODY
from trainyard.service.auth.permissions import SUBMIT
from trainyard.service.auth.principal import PrincipalDep
from trainyard.service.bodies import JsonBody, StrictBody
from trainyard.service.clock import utc_now
from trainyard.service.db.models import DeviceLeaseRow, JobRow
from trainyard.service.devices import xids
from trainyard.service.devices.inventory import Device
from trainyard.service.errors import SpecInvalid, with_problems
from trainyard.service.jobs.submission import HostLimits, kind_of, validate_spec, validate_without_corpus
from trainyard.service.launch.slurm.launcher import SLURM
from trainyard.service.planning.depth_dial import propose
from trainyard.service.planning.matrix_speed import MatrixEstimate
from trainyard.service.planning.preview import (
    QueuePosition,
    largest_batch_size,
    preview,
    sample_corpus,
    with_learning_rate,
)
from trainyard.service.planning.throughput import Throughput, find_throughput
from trainyard.service.schemas import PlanPreview, Proposal, ProposedSetting

router = APIRouter(tags=["jobs"], route_class=ServiceRoute)


@router.post("/jobs/plan", dependencies=[SUBMIT], openapi_extra=SPEC_BODY)
def plan_job(state: StateDep, caller: PrincipalDep, body: JsonBody) -> PlanPreview:
    """Preview the run of this spec: size, memory, disk space, time and warnings. Nothing is stored.

    Values that depend on the corpus are estimated from at most 4 MiB of it. A job's plan is exact once it has started.
    """
    host = state.host_limits(caller)
    spec = validate_spec(body, host, is_new=True)
    return with_learning_rate(make_preview(state, spec, host), spec)


class ProposalBody(StrictBody):
    """A depth, and the part of the spec that is set."""

    depth: Annotated[int, Field(ge=1, le=128)]
    spec: dict[str, Any] = Field(default_factory=dict)


@router.post("/jobs/proposal", dependencies=[SUBMIT])
def plan_proposal(state: StateDep, caller: PrincipalDep, body: ProposalBody) -> Proposal:
    """Propose the sizes of a run of `depth` layers, by published rules: a spec to edit. Nothing is stored or applied.

    Values in `spec` are kept, and the others are computed from them. It may lack the corpus.
    """
    host, last = state.host_limits(caller), None

    def read(raw: Mapping[str, Any]) -> JobSpec:
        nonlocal last
        last = validate_without_corpus(dict(raw), host)
        return last

    def largest(spec: JobSpec) -> int | None:
        return largest_batch_size(spec, kind_of(spec, host), state.inventory.devices())

    try:
        spec, proposed = propose(body.spec, body.depth, read, largest)
    except SpecInvalid as error:
        problems = [Problem(f"/spec{each['pointer']}", each["message"]) for each in error.extra["errors"]]
        raise with_problems(SpecInvalid, problems) from None
    assert last is not None
    settings = [
        ProposedSetting(
            pointer=pointer_to(each.group, each.field), value=each.value, reason=each.reason, source=each.source
        )
        for each in proposed
    ]
    return Proposal(depth=body.depth, parameters=costs.parameters(last.model), spec=spec, settings=settings)


def make_preview(state: AppState, spec: JobSpec, host: HostLimits) -> PlanPreview:
    """Return the preview of a valid spec."""
    # The devices of a cluster are unknown until Slurm has allocated some.
    devices = state.inventory.devices() if spec.resources.launcher != SLURM else ()
    kind = kind_of(spec, host)
    sample = sample_corpus(spec, state.settings.readable_roots, state.settings.corpus_cache)
    with state.database.read() as session:
        throughput = find_throughput(session, spec, kind)
        position, free = _queue_position(session, spec, kind, devices)
    speed: Throughput | MatrixEstimate | None = throughput
    # Only on a free device: a measurement must not slow a run down.
    measures = state.matrix_speed if free else None
    if speed is None and sample.size is not None and measures is not None:
        speed = measures.estimate(spec, kind, sample.size.attention_length, free[0])
    products = measures.bfloat16_on_cpu(spec, kind) if measures is not None else None
    return preview(spec, kind, sample, devices, speed, position, state.settings, products)


def _queue_position(
    session: Session, spec: JobSpec, kind: str, devices: Sequence[Device]
) -> tuple[QueuePosition, list[Device]]:
    """Return the position in the queue, and the free devices of this kind."""
    is_ahead = (JobRow.status == JobStatus.QUEUED, JobRow.priority >= spec.resources.priority)
    ahead = session.scalar(select(func.count()).select_from(JobRow).where(*is_ahead)) or 0
    leased = set(session.scalars(select(DeviceLeaseRow.device)))
    marked = xids.with_xid_errors(devices, xids.uncleared(session, utc_now()))
    usable = [d for d in marked if not d.processes and d.works]
    free = [d for d in usable if kind in (d.kind, d.id) and d.id not in leased]
    return QueuePosition(ahead, len(free)), free
