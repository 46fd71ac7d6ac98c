"""Scores on tasks in the database: those of the training, and of evaluations that were requested."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select, tuple_

from trainyard.contract.parsing import Problem
from trainyard.service.db.models import EvaluationRow
from trainyard.service.errors import EvaluationNotFound, RequestInvalid, with_problems
from trainyard.service.evaluations.requests import DONE, FAILED, PENDING, RUNNING
from trainyard.service.jobs.listing import MAX_DIGITS
from trainyard.service.jobs.presenters import columns
from trainyard.service.jobs.queries import require_job
from trainyard.service.schemas import Evaluation, TaskScore

ORDER = (EvaluationRow.step, EvaluationRow.task, EvaluationRow.number)


def page(
    connection: Connection,
    job_id: str,
    step: int | None,
    task: str | None,
    limit: int,
    after: str | None,
    newest: bool = False,
) -> tuple[Sequence[Row[Any]], bool]:
    """Return a page of the job's scores by step and task, and whether more follow.

    ``newest``: only the score of the last step on each task, the newest one if there are several. Scores of steps that
    were repeated since are left out. Raises JobNotFound, or RequestInvalid if no score has the id ``after``.
    """
    require_job(connection, job_id)
    query = select(*EvaluationRow.__table__.c).where(EvaluationRow.job_id == job_id, EvaluationRow.stitched.is_(True))
    if step is not None:
        query = query.where(EvaluationRow.step == step)
    if task is not None:
        query = query.where(EvaluationRow.task == task)
    if newest:
        query = query.where(EvaluationRow.number.in_(_newest(job_id)))
    if after is not None:
        query = query.where(tuple_(*ORDER) > tuple_(*_place_of(connection, job_id, after)))
    rows = connection.execute(query.order_by(*ORDER).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def _newest(job_id: str) -> Select[Any]:
    measured = (
        EvaluationRow.job_id == job_id,
        EvaluationRow.stitched.is_(True),
        EvaluationRow.state == DONE,
    )
    last = select(EvaluationRow.task, func.max(EvaluationRow.step).label("step")).where(*measured)
    last_step = last.group_by(EvaluationRow.task).subquery()
    at_last = (EvaluationRow.task == last_step.c.task, EvaluationRow.step == last_step.c.step)
    return select(func.max(EvaluationRow.number)).where(*measured, *at_last).group_by(EvaluationRow.task)


def _place_of(connection: Connection, job_id: str, after: str) -> tuple[int, str, int]:
    valid = after.isdecimal() and after.isascii() and len(after) <= MAX_DIGITS
    number = int(after) if valid else 0
    own = select(*ORDER).where(EvaluationRow.job_id == job_id, EvaluationRow.number == number)
    row = connection.execute(own).first()
    if row is None:
        raise with_problems(RequestInvalid, [Problem("/query/after", "must be an id from this list")])
    return row.step, row.task, row.number


def to_score_response(row: EvaluationRow | Row[Any]) -> TaskScore:
    """Return a row as the API shows it."""
    return TaskScore(id=str(row.number), **columns(row, TaskScore, "id"))


def to_evaluation_response(connection: Connection, job_id: str, evaluation_id: str) -> Evaluation:
    """Return an evaluation and its scores as the API shows them. Raises EvaluationNotFound or JobNotFound."""
    require_job(connection, job_id)
    same = (EvaluationRow.job_id == job_id, EvaluationRow.evaluation_id == evaluation_id)
    rows = connection.execute(select(*EvaluationRow.__table__.c).where(*same).order_by(EvaluationRow.number)).all()
    if not rows:
        raise EvaluationNotFound()
    states = {row.state for row in rows}
    state = next(state for state in (RUNNING, PENDING, FAILED, DONE) if state in states)
    ended = state in (FAILED, DONE)
    return Evaluation.model_validate(
        {
            "id": evaluation_id,
            "state": RUNNING if state == PENDING and len(states) > 1 else state,
            "error": next((row.error for row in rows if row.error is not None), None),
            "finished_at": max(row.finished_at for row in rows) if ended else None,
            "results": [to_score_response(row) for row in rows],
            **{name: getattr(rows[0], name) for name in ("job_id", "step", "requested_by", "created_at")},
            **{name: getattr(rows[-1], name) for name in ("device", "started_at")},
        }
    )
