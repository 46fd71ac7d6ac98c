"""GET /jobs/{id}/metrics, as JSON, CSV or one object a line."""

import csv
import io
import json
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from contract.parsing import Problem
from service.context import ServicesNeeded
from service.errors import RequestInvalid, with_problems
from service.jobs import store as jobs
from service.metrics import ancestry, sealing, store, summaries
from service.metrics.buckets import buckets, width
from service.tables import JobRow

LARGEST = 2**53 - 1
DEFAULT_LIMIT = 1000
LARGEST_LIMIT = 10_000

Step = Annotated[int, Query(ge=0, le=LARGEST)]
Count = Annotated[int, Query(ge=1, le=LARGEST_LIMIT)]

router = APIRouter(tags=["metrics"])


@router.get("/jobs/{job_id}/metrics")
def metrics(
    request: Request,
    services: ServicesNeeded,
    job_id: str,
    after_step: Step = 0,
    limit: Count = DEFAULT_LIMIT,
    attempt: Annotated[int | None, Query(ge=1, le=LARGEST)] = None,
    fields: Annotated[str | None, Query(max_length=1000)] = None,
    max_points: Annotated[int | None, Query(ge=1, le=LARGEST_LIMIT)] = None,
    until_step: Annotated[int | None, Query(ge=0, le=LARGEST)] = None,
    ema_half_life: Annotated[float, Query(ge=0, le=1e9, allow_inf_nan=False)] = 50.0,
    lineage: bool = False,
) -> Response:
    """The curve, oldest step first. Without `attempt` it is stitched: each step stands once.

    With `max_points` the rows are buckets over the whole curve, and `resolution` is the steps in each. With `lineage` a
    fork's curve begins with those of its ancestors; `lineage` in the list and `job_id` in each row say whose it is.
    """
    wanted = _fields(fields)
    if lineage and attempt is not None:
        raise with_problems(RequestInvalid, [Problem("/query/lineage", "cannot be given with attempt")])
    with services.database.read() as session:
        job = jobs.find(session, job_id)
        rest: dict[str, Any] = {"lineage": ancestry.shown(session, job)} if lineage else {}
        if max_points is None:
            found = (
                ancestry.rows(session, job, after_step, limit + 1, wanted)
                if lineage
                else store.rows(session, job_id, attempt, after_step, limit + 1, wanted)
            )
            return _answer(request, found[:limit], {"has_more": len(found) > limit, **rest})
        last = store.last_step(session, job_id, attempt)
        if lineage:
            last = max(last, job.parent_step or 0)
        wide = width(min(last, until_step) if until_step is not None else last, max_points, after_step + 1)
        view = sealing.View(wide, ema_half_life, (after_step + 1) // wide * wide, until_step)
        rows = ancestry.buckets(session, job, view) if lineage else _own(session, job, attempt, view)
        if fields is not None and lineage:
            _add_of_each(session, rows, wanted)
        elif fields is not None:
            store.add_last(session, job_id, rows, wanted)
            if "eval_loss" in wanted:
                store.add_evaluations(session, job_id, attempt, rows, _evaluated_every(job.spec))
    return _answer(request, rows, {"has_more": False, "resolution": wide, **rest})


def _own(session: Session, job: JobRow, attempt: int | None, view: sealing.View) -> list[dict[str, Any]]:
    """The view of the job's curve, or of one attempt's."""
    if attempt is None and sealing.is_kept(view):
        made = summaries.rows(sealing.parts(session, job, view), view.wide, view.half_life)
    else:
        made = buckets(store.points(session, job.id, attempt, view.until_step), view.wide, view.half_life)
    return [row for row in made if row["step"] >= view.begin]


def _add_of_each(session: Session, rows: list[dict[str, Any]], wanted: Sequence[str]) -> None:
    """Fields of a line's rows, each from the job that it belongs to."""
    for job_id, own in groupby(rows, itemgetter("job_id")):
        store.add_last(session, job_id, list(own), wanted)


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


def _answer(request: Request, rows: list[dict[str, Any]], rest: dict[str, Any]) -> Response:
    rows = [store.shown(row) for row in rows]
    accept = request.headers.get("accept", "")
    if "text/csv" in accept:
        return Response(_csv(rows), media_type="text/csv")
    if "application/x-ndjson" in accept:
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        return Response(lines, media_type="application/x-ndjson")
    return JSONResponse({"object": "list", "data": rows, **rest})


def _csv(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
