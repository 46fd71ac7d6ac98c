"""The route that returns a job's metrics, as JSON, CSV or JSON lines."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic_core import to_json
from sqlalchemy import Connection, select
from sqlalchemy.orm import Session

from trainyard.contract.events import HeldOutResult
from trainyard.contract.parsing import Problem
from trainyard.contract.smoothing import HALF_LIFE
from trainyard.contract.status import TERMINAL
from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.shared_reads import shared
from trainyard.service.auth.permissions import READ
from trainyard.service.db.models import EventRow, JobRow
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.jobs import queries
from trainyard.service.jobs import repository as jobs
from trainyard.service.metrics import rollups, smoothing, store
from trainyard.service.metrics.downsampling import BUCKET_FIELDS, Aggregate, bucket_width
from trainyard.service.metrics.downsampling import to_buckets as bucket_rows
from trainyard.service.metrics.lineage import lineage_aggregates, lineage_buckets, lineage_rows, show_lineage
from trainyard.service.schemas import MetricPage

MAX_STEP = 2**53 - 1
DEFAULT_LIMIT = 1000
MAX_LIMIT = 10_000
NONFINITE, EVAL, SMOOTHED = "nonfinite", "eval", "loss_smooth"
_TEXT = {"schema": {"type": "string"}}
ROWS: dict[str, Any] = {"content": {"text/csv": _TEXT, "application/x-ndjson": _TEXT}}

Step = Annotated[int, Query(ge=0, le=MAX_STEP)]
Count = Annotated[int, Query(ge=1, le=MAX_LIMIT)]
SmoothWidth = Annotated[Literal["auto"] | Annotated[float, Query(ge=0, le=1e9, allow_inf_nan=False)] | None, Query()]

router = APIRouter(tags=["metrics"], route_class=ServiceRoute)


def curve_part(connection: Connection, job_id: str, query: bytes) -> object:
    """Return the rows that change whenever the job's curve does; None if its points may change without them."""
    if b"lineage" in query:
        return None  # its ancestors' curves count too
    job = connection.execute(queries.CURVE_OF_JOB, {"job_id": job_id}).first()
    # Retention deletes points of jobs that have ended, and changes no other row.
    if job is None or job.status in TERMINAL:
        return None
    return tuple(job), connection.execute(queries.REPORTED_OF_JOB, {"job_id": job_id}).all()


@router.get("/jobs/{job_id}/metrics", dependencies=[READ], response_model=MetricPage, responses={200: ROWS})
@shared(curve_part)
def list_metrics(
    request: Request,
    state: StateDep,
    job_id: str,
    after_step: Step = 0,
    limit: Count = DEFAULT_LIMIT,
    attempt: Annotated[int | None, Query(ge=1, le=MAX_STEP)] = None,
    fields: Annotated[str | None, Query(max_length=1000)] = None,
    max_points: Annotated[int | None, Query(ge=1, le=MAX_LIMIT)] = None,
    until_step: Annotated[int | None, Query(ge=0, le=MAX_STEP)] = None,
    ema_half_life: Annotated[float, Query(ge=0, le=1e9, allow_inf_nan=False)] = 50.0,
    smooth_width: SmoothWidth = None,
    lineage: bool = False,
) -> Response:
    """Return the curve, oldest step first. Without `attempt`, the attempts are stitched: each step occurs once.

    With `max_points` the rows are buckets of the whole curve, with `resolution` steps each; with `smooth_width` they
    have `loss_smooth`, the loss smoothed without lag. With `lineage` a fork's curve starts with those of its
    ancestors, and `lineage` and the `job_id` of a row tell which job it belongs to.
    """
    selected = fields is not None
    query = MetricsQuery(
        _parse_fields(fields), selected, after_step, until_step, limit, attempt, lineage, ema_half_life, smooth_width
    )
    if lineage and attempt is not None:
        raise with_problems(RequestInvalid, [Problem("/query/lineage", "cannot be given with attempt")])
    with state.database.read() as session:
        job = jobs.find(session, job_id)
        extra: dict[str, Any] = {"lineage": show_lineage(session, job)} if lineage else {}
        result = _points(session, job, query) if max_points is None else _buckets(session, job, query, max_points)
        sets = [str(each["name"]) for each in job.facts.get("eval_sets") or ()]
    return _response(request, replace(result, envelope={**result.envelope, **extra}), sets)


@dataclass(frozen=True)
class MetricsQuery:
    """The parameters of a request. ``selected``: the client has named the fields."""

    fields: Sequence[str]
    selected: bool
    after_step: int
    until_step: int | None
    limit: int
    attempt: int | None
    lineage: bool
    half_life: float
    smooth_width: float | Literal["auto"] | None

    @property
    def columns(self) -> Sequence[str]:
        """The columns to read. A value that was not finite is NULL; `nonfinite` distinguishes it from a missing one."""
        return list(dict.fromkeys([*self.fields, NONFINITE]))


@dataclass(frozen=True)
class MetricsResult:
    """Rows, the column names (known even if there are no rows), and the other fields of the response."""

    rows: list[dict[str, Any]]
    names: Sequence[str]
    envelope: dict[str, Any]


def _points(session: Session, job: JobRow, query: MetricsQuery) -> MetricsResult:
    # One row more than the page has shows whether there is a next page.
    limit = query.limit + 1
    if query.lineage:
        rows = lineage_rows(session, job, query.after_step, limit, query.columns, query.until_step)
    else:
        rows = store.rows(session, job.id, query.attempt, query.after_step, limit, query.columns, query.until_step)
    names = ["job_id", *query.fields] if query.lineage else query.fields
    return MetricsResult(rows[: query.limit], names, {"has_more": len(rows) > query.limit})


def _buckets(session: Session, job: JobRow, query: MetricsQuery, max_points: int) -> MetricsResult:
    last, until = store.last_step(session, job.id, query.attempt), query.until_step
    if query.lineage:
        last = max(last, job.parent_step or 0)
    steps = bucket_width(min(last, until) if until is not None else last, max_points, query.after_step + 1)
    view = rollups.RollupView(steps, query.half_life, (query.after_step + 1) // steps * steps, until)
    rows = lineage_buckets(session, job, view) if query.lineage else _own_buckets(session, job, query.attempt, view)
    smoothed: dict[str, Any] = {}
    if query.smooth_width is not None:
        width = smoothing.auto_width(last) if query.smooth_width == "auto" else query.smooth_width
        _add_smoothed(session, job, query, rows, width, last)
        smoothed = {"smooth_width": width}
    if query.selected:
        _add_fields(session, job, query, rows)
    names = [*(["job_id"] if query.lineage else []), *BUCKET_FIELDS, *([SMOOTHED] if smoothed else [])]
    names = list(dict.fromkeys([*names, *(query.fields if query.selected else ())]))
    return MetricsResult(rows, names, {"has_more": False, "resolution": steps, **smoothed})


def _own_buckets(session: Session, job: JobRow, attempt: int | None, view: rollups.RollupView) -> list[dict[str, Any]]:
    if attempt is None:
        parts = rollups.aggregates(session, job, view)
    else:
        parts = store.points(session, job.id, attempt, view.until_step)
    return [row for row in bucket_rows(parts, view.width, view.half_life) if row["step"] >= view.begin]


def _add_smoothed(
    session: Session, job: JobRow, query: MetricsQuery, rows: list[dict[str, Any]], width: float, last_step: int
) -> None:
    """Add `loss_smooth` at the last step of each bucket, and null to buckets without a finite loss."""
    measured = [row for row in rows if row["loss_mean"] is not None]
    values: list[float | None] = [row["loss"] for row in measured]
    if measured and width > 0:
        steps = [row["step"] for row in measured]
        ranges = smoothing.covered_ranges(steps, width, last_step)
        cells = smoothing.to_cells(_points_within(session, job, query, ranges, smoothing.cell_width(width)), width)
        values = smoothing.smooth(cells, steps, width, last_step)
    for row in rows:
        row[SMOOTHED] = None
    for row, value in zip(measured, values, strict=True):
        row[SMOOTHED] = value


def _points_within(
    session: Session, job: JobRow, query: MetricsQuery, ranges: Sequence[tuple[int, int]], cell: int
) -> Iterator[Aggregate]:
    """Yield the points of the ranges, or sums over at most ``cell`` steps. There may be others between the ranges."""
    first, last = ranges[0][0], ranges[-1][1]
    view = rollups.RollupView(cell, HALF_LIFE, first, last)
    if query.attempt is not None:
        parts = store.points(session, job.id, query.attempt, last, first)
    elif query.lineage:
        parts = lineage_aggregates(session, job, view)
    elif cell >= rollups.FINEST:
        parts = rollups.sums(session, job, cell, first, last)
    else:
        parts = store.sums(session, job.id, ranges, cell)
    return (part for part in parts if part.step >= first)


def _add_fields(session: Session, job: JobRow, query: MetricsQuery, rows: list[dict[str, Any]]) -> None:
    evaluated = [name for name in store.EVALUATION_FIELDS if name in query.fields]
    for job_id, group in groupby(rows, lambda row: row.get("job_id", job.id)):
        own = list(group)
        store.add_last(session, job_id, own, query.columns)
        spec = job.spec if job_id == job.id else session.scalar(select(JobRow.spec).where(JobRow.id == job_id))
        if evaluated and spec is not None:
            interval = spec["reporting"]["eval_interval"]
            if interval is None and not _save_interval_has_changed(session, job_id):
                interval = spec["checkpoint"]["save_interval"]
            store.add_evaluations(session, job_id, query.attempt, own, evaluated, interval)


def _save_interval_has_changed(session: Session, job_id: str) -> bool:
    changes = select(EventRow.data).where(EventRow.job_id == job_id, EventRow.kind == "changed")
    return any("save_interval" in data.get("fields", ()) for data in session.scalars(changes))


def _parse_fields(text: str | None) -> Sequence[str]:
    if text is None:
        return store.FIELDS
    names = [name.strip() for name in text.split(",") if name.strip()]
    if any(name not in store.FIELDS for name in names):
        message = f"must be names among {', '.join(store.FIELDS)}, separated by commas"
        raise with_problems(RequestInvalid, [Problem("/query/fields", message)])
    return list(dict.fromkeys([*store.ALWAYS, *names]))


def _response(request: Request, result: MetricsResult, sets: Sequence[str]) -> Response:
    """Return the response. ``sets``: the names of the job's held-out sets."""
    rows = [store.with_time_as_text(_project(row, result.names)) for row in result.rows]
    accept = request.headers.get("accept", "")
    if "text/csv" in accept:
        return Response(_csv(rows, result.names, sets), media_type="text/csv", headers=_next_link(request, result))
    if "application/x-ndjson" in accept:
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        return Response(lines, media_type="application/x-ndjson", headers=_next_link(request, result))
    # Several times as fast as JSONResponse. There is no NaN: the rows have null instead.
    body = to_json({"object": "list", "data": rows, **result.envelope}, inf_nan_mode="null")
    return Response(body, media_type="application/json")


def _project(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    # A true `nonfinite` stays, even if the client did not request it: it explains a null.
    if NONFINITE not in names and not row[NONFINITE]:
        del row[NONFINITE]
    return row


def _next_link(request: Request, result: MetricsResult) -> dict[str, str]:
    # CSV and JSON lines have no `has_more`, so the next page is in a Link header.
    if not result.envelope["has_more"]:
        return {}
    following = request.url.include_query_params(after_step=result.rows[-1]["step"])
    return {"Link": f'<{following.path}?{following.query}>; rel="next"'}


def _csv(rows: list[dict[str, Any]], names: Sequence[str], sets: Sequence[str]) -> str:
    text = io.StringIO()
    extra = [NONFINITE] if NONFINITE not in names and any(NONFINITE in row for row in rows) else []
    if EVAL in names:
        # Two columns for each held-out set. An ancestor may have other sets than the job.
        known = dict.fromkeys([*sets, *(name for row in rows for name in row[EVAL] or ())])
        names = [column for name in names for column in ([name] if name != EVAL else _eval_columns(known))]
        rows = [row | _eval_cells(row[EVAL] or {}) for row in rows]
    writer = csv.DictWriter(text, fieldnames=[*names, *extra], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _eval_columns(sets: Iterable[str]) -> list[str]:
    return [f"eval.{name}.{unit}" for name in sets for unit in HeldOutResult.model_fields]


def _eval_cells(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"eval.{name}.{unit}": value for name, result in results.items() for unit, value in result.items()}
