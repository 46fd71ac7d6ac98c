"""GET /jobs/{id}/metrics, as JSON, CSV or one object a line."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from trainyard.contract.parsing import Problem
from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import READ
from trainyard.service.db.models import JobRow
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.jobs import repository as jobs
from trainyard.service.metrics import rollups, store
from trainyard.service.metrics.downsampling import BUCKET_FIELDS, bucket_width
from trainyard.service.metrics.downsampling import to_buckets as bucket_rows
from trainyard.service.metrics.lineage import lineage_buckets, lineage_rows, show_lineage
from trainyard.service.schemas import MetricPage

MAX_STEP = 2**53 - 1
DEFAULT_LIMIT = 1000
MAX_LIMIT = 10_000
NONFINITE = "nonfinite"
_TEXT = {"schema": {"type": "string"}}
ROWS: dict[str, Any] = {"content": {"text/csv": _TEXT, "application/x-ndjson": _TEXT}}

Step = Annotated[int, Query(ge=0, le=MAX_STEP)]
Count = Annotated[int, Query(ge=1, le=MAX_LIMIT)]

router = APIRouter(tags=["metrics"], route_class=ServiceRoute)


@router.get("/jobs/{job_id}/metrics", dependencies=[READ], response_model=MetricPage, responses={200: ROWS})
def metrics(
    request: Request,
    services: StateDep,
    job_id: str,
    after_step: Step = 0,
    limit: Count = DEFAULT_LIMIT,
    attempt: Annotated[int | None, Query(ge=1, le=MAX_STEP)] = None,
    fields: Annotated[str | None, Query(max_length=1000)] = None,
    max_points: Annotated[int | None, Query(ge=1, le=MAX_LIMIT)] = None,
    until_step: Annotated[int | None, Query(ge=0, le=MAX_STEP)] = None,
    ema_half_life: Annotated[float, Query(ge=0, le=1e9, allow_inf_nan=False)] = 50.0,
    lineage: bool = False,
) -> Response:
    """The curve, oldest step first. Without `attempt` it is stitched: each step stands once.

    With `max_points` the rows are buckets over the whole curve, and `resolution` is the steps in each. With `lineage` a
    fork's curve begins with those of its ancestors; `lineage` in the list and `job_id` in each row say whose it is.
    """
    asked = MetricsQuery(
        _fields(fields), fields is not None, after_step, until_step, limit, attempt, lineage, ema_half_life
    )
    if lineage and attempt is not None:
        raise with_problems(RequestInvalid, [Problem("/query/lineage", "cannot be given with attempt")])
    with services.database.read() as session:
        job = jobs.find(session, job_id)
        rest: dict[str, Any] = {"lineage": show_lineage(session, job)} if lineage else {}
        found = _points(session, job, asked) if max_points is None else _buckets(session, job, asked, max_points)
    return _response(request, replace(found, rest={**found.rest, **rest}))


@dataclass(frozen=True)
class MetricsQuery:
    """What a reader of the curve wants. ``some``: the fields were named one by one."""

    fields: Sequence[str]
    selected: bool
    after_step: int
    until_step: int | None
    limit: int
    attempt: int | None
    lineage: bool
    half_life: float

    @property
    def columns(self) -> Sequence[str]:
        """What is read of a point: a number that was not finite is told from one that was not measured."""
        return list(dict.fromkeys([*self.fields, NONFINITE]))


@dataclass(frozen=True)
class MetricsResult:
    """Rows, the names that each has, also where there are none, and what stands beside them in the list."""

    rows: list[dict[str, Any]]
    names: Sequence[str]
    rest: dict[str, Any]


def _points(session: Session, job: JobRow, asked: MetricsQuery) -> MetricsResult:
    """A page of the points themselves."""
    most = asked.limit + 1
    if asked.lineage:
        rows = lineage_rows(session, job, asked.after_step, most, asked.columns, asked.until_step)
    else:
        rows = store.rows(session, job.id, asked.attempt, asked.after_step, most, asked.columns, asked.until_step)
    names = ["job_id", *asked.fields] if asked.lineage else asked.fields
    return MetricsResult(rows[: asked.limit], names, {"has_more": len(rows) > asked.limit})


def _buckets(session: Session, job: JobRow, asked: MetricsQuery, max_points: int) -> MetricsResult:
    """The curve, or the part of it that is looked at, as rows of one width."""
    last, until = store.last_step(session, job.id, asked.attempt), asked.until_step
    if asked.lineage:
        last = max(last, job.parent_step or 0)
    wide = bucket_width(min(last, until) if until is not None else last, max_points, asked.after_step + 1)
    view = rollups.RollupView(wide, asked.half_life, (asked.after_step + 1) // wide * wide, until)
    rows = lineage_buckets(session, job, view) if asked.lineage else _own(session, job, asked.attempt, view)
    if asked.selected:
        _add_fields(session, job, asked, rows)
    return MetricsResult(rows, _bucket_names(asked), {"has_more": False, "resolution": wide})


def _own(session: Session, job: JobRow, attempt: int | None, view: rollups.RollupView) -> list[dict[str, Any]]:
    """The view of the job's curve, or of one attempt's."""
    if attempt is None:
        parts = rollups.aggregates(session, job, view)
    else:
        parts = store.points(session, job.id, attempt, view.until_step)
    return [row for row in bucket_rows(parts, view.width, view.half_life) if row["step"] >= view.begin]


def _add_fields(session: Session, job: JobRow, asked: MetricsQuery, rows: list[dict[str, Any]]) -> None:
    """The fields that were named, of a line's rows each from the job that it belongs to."""
    if asked.lineage:
        for job_id, own in groupby(rows, itemgetter("job_id")):
            store.add_last(session, job_id, list(own), asked.columns)
        return
    store.add_last(session, job.id, rows, asked.columns)
    if "eval_loss" in asked.fields:
        store.add_evaluations(session, job.id, asked.attempt, rows, _evaluated_every(job.spec))


def _bucket_names(asked: MetricsQuery) -> Sequence[str]:
    first, extra = ["job_id"] if asked.lineage else [], asked.fields if asked.selected else ()
    return list(dict.fromkeys([*first, *BUCKET_FIELDS, *extra]))


def _evaluated_every(spec: dict[str, Any]) -> int:
    """Steps from one evaluation to the next, as the worker's calendar has it."""
    return int(spec["reporting"]["eval_interval"] or spec["checkpoint"]["save_interval"])


def _fields(given: str | None) -> Sequence[str]:
    if given is None:
        return store.FIELDS
    asked = [name.strip() for name in given.split(",") if name.strip()]
    if any(name not in store.FIELDS for name in asked):
        message = f"must be names among {', '.join(store.FIELDS)}, separated by commas"
        raise with_problems(RequestInvalid, [Problem("/query/fields", message)])
    return list(dict.fromkeys([*store.ALWAYS, *asked]))


def _response(request: Request, found: MetricsResult) -> Response:
    rows = [store.with_time_as_text(_projected(row, found.names)) for row in found.rows]
    accept = request.headers.get("accept", "")
    if "text/csv" in accept:
        return Response(_csv(rows, found.names), media_type="text/csv", headers=_next(request, found))
    if "application/x-ndjson" in accept:
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        return Response(lines, media_type="application/x-ndjson", headers=_next(request, found))
    return JSONResponse({"object": "list", "data": rows, **found.rest})


def _projected(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The row; that a number in it was not finite is told also where that was not asked for."""
    if NONFINITE not in names and not row[NONFINITE]:
        del row[NONFINITE]
    return row


def _next(request: Request, found: MetricsResult) -> dict[str, str]:
    """Where the next page is, for rows that have no list around them to say that there is one."""
    if not found.rest["has_more"]:
        return {}
    following = request.url.include_query_params(after_step=found.rows[-1]["step"])
    return {"Link": f'<{following.path}?{following.query}>; rel="next"'}


def _csv(rows: list[dict[str, Any]], names: Sequence[str]) -> str:
    text = io.StringIO()
    told = [NONFINITE] if NONFINITE not in names and any(NONFINITE in row for row in rows) else []
    writer = csv.DictWriter(text, fieldnames=[*names, *told])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
