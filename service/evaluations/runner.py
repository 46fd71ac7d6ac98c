"""Runs requested evaluations in side processes, a few at a time, oldest first. Only the service that schedules does it.

The state is in the database. If the service ends, its side processes end with it, and the next service runs what was
running again. Scores that are stored already are kept.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from trainyard.contract.evaluation import EvaluationRequest
from trainyard.contract.events import TaskScored
from trainyard.contract.rundir import RunDir
from trainyard.contract.sidecar import MAX_MESSAGE_BYTES, encode_message
from trainyard.contract.spec import JobSpec, TaskSpec
from trainyard.service.clock import utc_now
from trainyard.service.db.models import EvaluationRow
from trainyard.service.evaluations.requests import DONE, FAILED, PENDING, RUNNING, release_weights
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.leadership import LeadershipLost
from trainyard.service.settings import Settings
from trainyard.service.sidecars.sidecars import Sidecar, Sidecars

PROGRAM = ("-m", "trainyard.worker.evaluation")

POLL_SECONDS = 2.0
SILENT_SECONDS = 900.0
"""A process that sends nothing for so long is considered hung. A batch of a large model on a CPU may take minutes."""

DIED = "the process ended before it was done; perhaps the host had too little memory. The service's log has more"
HUNG = f"the process has reported nothing for {SILENT_SECONDS / 60:g} minutes"
BROKEN = "internal error of the service; see its log"
GONE = "the weights are missing: the directory of the evaluation was removed"

log = logging.getLogger("trainyard")

Transaction = Callable[[], AbstractContextManager[Session]]


class _Work(NamedTuple):
    """The tasks that an evaluation still has to score, and the directory of its weights."""

    step: int
    spec: JobSpec
    directory: Path
    tasks: list[TaskSpec]


class EvaluationRunner:
    """Starts evaluations in its own thread. Tests call `round` and `join` directly.

    ``writing``: a transaction that only the leader may use, see `Scheduler.writing`. ``leads``: whether this service
    is the leader, and may start processes.
    """

    def __init__(
        self,
        settings: Settings,
        sidecars: Sidecars,
        reading: Transaction,
        writing: Transaction,
        leads: Callable[[], bool],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._settings = settings
        self._sidecars = sidecars
        self._reading = reading
        self._writing = writing
        self._leads = leads
        self._clock = clock
        self._active: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluations", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Start no more evaluations. Those that run end with their processes, and stay ``running`` in the database."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def wake(self) -> None:
        """Look for new evaluations now."""
        self._wake.set()

    def join(self, seconds: float) -> None:
        """Wait for the evaluations that run now."""
        with self._lock:
            threads = list(self._active.values())
        for thread in threads:
            thread.join(seconds)

    def round(self) -> None:
        """Start evaluations that wait, as many as may run."""
        if not self._leads() or self._stopping.is_set():
            return
        with self._lock:
            active = set(self._active)
        self._restart_lost(active)
        room = self._settings.evaluation_processes - len(active)
        for evaluation_id in self._pending(room) if room > 0 else ():
            thread = threading.Thread(
                target=self._run_one, args=(evaluation_id,), name=f"evaluation-{evaluation_id}", daemon=True
            )
            with self._lock:
                self._active[evaluation_id] = thread
            thread.start()

    def _restart_lost(self, active: set[str]) -> None:
        """Set running evaluations without a process back to pending: their service has ended."""
        lost = (EvaluationRow.state == RUNNING, EvaluationRow.evaluation_id.not_in(active))
        with self._reading() as session:
            if session.scalar(select(EvaluationRow.number).where(*lost).limit(1)) is None:
                return
        with self._writing() as session:
            session.execute(update(EvaluationRow).where(*lost).values(state=PENDING, started_at=None, device=None))

    def _pending(self, count: int) -> list[str]:
        with self._reading() as session:
            rows = session.execute(
                select(EvaluationRow.evaluation_id)
                .where(EvaluationRow.state == PENDING, EvaluationRow.evaluation_id.is_not(None))
                .order_by(EvaluationRow.number)
            )
            return list(dict.fromkeys(str(row.evaluation_id) for row in rows))[:count]

    def _run_one(self, evaluation_id: str) -> None:
        try:
            self._evaluate(evaluation_id)
        except LeadershipLost:
            log.info("another service schedules now and runs the evaluations")
        except Exception:
            log.exception("an evaluation failed", extra={"evaluation": evaluation_id})
            with suppress(Exception):
                self._fail(evaluation_id, BROKEN)
        finally:
            with self._lock:
                del self._active[evaluation_id]
            self._wake.set()

    def _evaluate(self, evaluation_id: str) -> None:
        directory = None
        while (work := self._begin(evaluation_id)) is not None:
            directory = work.directory
            reason = self._try(evaluation_id, work)
            if self._stopping.is_set():
                return  # It stays running in the database: the next service continues it.
            if reason is not None:
                self._fail(evaluation_id, reason)
        if directory is not None:
            release_weights(directory, self._settings.writable_roots)

    def _try(self, evaluation_id: str, work: _Work) -> str | None:
        """Run the process. Return why the evaluation failed, or None."""
        if not work.directory.is_dir():
            return GONE
        try:
            return self._run_process(evaluation_id, work)
        except LeadershipLost:
            raise
        except Exception:
            # The caller records it, and releases the weights, which would stay on the disk.
            log.exception("an evaluation failed", extra={"evaluation": evaluation_id})
            return BROKEN

    def _begin(self, evaluation_id: str) -> _Work | None:
        """Mark the tasks that have no result as running, and return them; None if all have one."""
        with self._writing() as session:
            which = select(EvaluationRow).where(*_open(evaluation_id)).order_by(EvaluationRow.number)
            rows = session.scalars(which).all()
            if not rows:
                return None
            for row in rows:
                row.state, row.started_at = RUNNING, row.started_at or self._clock()
            job = repository.find(session, rows[0].job_id)
            run = RunDir(self._settings.runs / job.id)
            # A resume may have changed save_dir since the evaluation was requested.
            save_dir = job.spec["checkpoint"]["save_dir"]
            directory = run.find_directory(save_dir, lambda artifacts: artifacts.evaluation(evaluation_id))
            spec = JobSpec.model_validate_json(json.dumps(job.spec))
            tasks = [TaskSpec.model_validate({"name": row.task, "path": row.path, "kind": row.kind}) for row in rows]
            return _Work(rows[0].step, spec, directory, tasks)

    def _run_process(self, evaluation_id: str, work: _Work) -> str | None:
        """Evaluate in a side process and store the results. Return why it failed, or None.

        Also None if a job needs the device of the process: the caller then continues without it.
        """
        try:
            sidecar = self._sidecars.start(f"evaluation {evaluation_id}", PROGRAM, use_gpu=True)
        except OSError as error:
            return f"the process could not be started: {error.strerror or error}"
        try:
            self._update(evaluation_id, device=sidecar.device)
            reason = self._follow(evaluation_id, work, sidecar)
        finally:
            sidecar.close()
        return reason if not sidecar.reclaimed else None

    def _follow(self, evaluation_id: str, work: _Work, sidecar: Sidecar) -> str | None:
        missing = {task.name for task in work.tasks}
        checked_at = self._clock()
        sidecar.connection.settimeout(SILENT_SECONDS)
        try:
            sidecar.connection.sendall(encode_message(_request(work).model_dump(mode="json")))
            for line in _lines(sidecar):
                match line["event"]:
                    case "scored":
                        self._store(evaluation_id, work, TaskScored.model_validate(line))
                        missing.discard(line["task"])
                    case "task_failed":
                        self._fail(evaluation_id, line["message"], line["task"])
                        missing.discard(line["task"])
                    case "failed":
                        return str(line["message"])
                    case "done" if not missing:
                        return None
                if (self._clock() - checked_at).total_seconds() > POLL_SECONDS:
                    checked_at = self._clock()
                    if not self._is_wanted(evaluation_id):
                        return None  # The job was deleted.
        except TimeoutError:
            return HUNG
        except (OSError, ValueError):
            return DIED
        return DIED

    def _is_wanted(self, evaluation_id: str) -> bool:
        with self._reading() as session:
            return session.scalar(select(EvaluationRow.number).where(*_open(evaluation_id)).limit(1)) is not None

    def _store(self, evaluation_id: str, work: _Work, scored: TaskScored) -> None:
        values = scored.model_dump(
            include={"examples", "acc", "acc_norm", "bpb", "truncated", "file_sha256", "seconds"}
        )
        shown = ", ".join(
            f"{name} {values[name]:.4f}" for name in ("acc", "acc_norm", "bpb") if values[name] is not None
        )
        message = f"evaluated the checkpoint of step {work.step:,} on {scored.task}: {shown or 'not finite'}"
        self._end(evaluation_id, message, scored.task, state=DONE, **values)

    def _fail(self, evaluation_id: str, reason: str, task: str | None = None) -> None:
        on_task = f" on {task}" if task is not None else ""
        self._end(evaluation_id, f"an evaluation{on_task} failed: {reason}", task, state=FAILED, error=reason)

    def _end(self, evaluation_id: str, message: str, task: str | None, **values: Any) -> None:
        """End the open tasks of the evaluation, or ``task`` alone, and record an event."""
        with self._writing() as session:
            which = [*_open(evaluation_id), *([EvaluationRow.task == task] if task is not None else [])]
            rows = session.scalars(select(EvaluationRow).where(*which)).all()
            if not rows:
                return  # The job was deleted.
            job = repository.lock(session, rows[0].job_id)
            session.execute(update(EvaluationRow).where(*which).values(finished_at=self._clock(), **values))
            data = {"step": rows[0].step, "evaluation_id": evaluation_id, "tasks": [row.task for row in rows]}
            repository.record_event(
                session, job, EventDraft("evaluation", message, "service", data=data), self._clock()
            )

    def _update(self, evaluation_id: str, **values: Any) -> None:
        with self._writing() as session:
            session.execute(update(EvaluationRow).where(*_open(evaluation_id)).values(**values))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self.round()
            except LeadershipLost:
                log.info("another service schedules now and runs the evaluations")
            except Exception:
                log.exception("a round of evaluations failed")
            self._wake.wait(POLL_SECONDS)


def _open(evaluation_id: str) -> tuple[ColumnElement[bool], ...]:
    return EvaluationRow.evaluation_id == evaluation_id, EvaluationRow.state.in_((PENDING, RUNNING))


def _request(work: _Work) -> EvaluationRequest:
    spec = work.spec
    return EvaluationRequest(
        checkpoint=str(work.directory),
        step=work.step,
        tokenizer_path=spec.data.tokenizer_path,
        special_tokens=spec.data.special_tokens,
        dtype=spec.training.dtype,
        batch_tokens=spec.training.batch_size * spec.data.max_seq_len,
        tasks=work.tasks,
    )


def _lines(sidecar: Sidecar) -> Iterator[dict[str, Any]]:
    """Yield the lines of a side process until its end. Raises OSError or ValueError."""
    with sidecar.connection.makefile("rb") as lines:
        while line := lines.readline(MAX_MESSAGE_BYTES):
            yield json.loads(line)
