"""Execution of the scheduler's actions on corpora. Launchers are called between transactions, never inside one.

The agent of a preparation reports by files only, on this host and on a cluster: this reads them.
"""

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import assert_never

from sqlalchemy import delete
from sqlalchemy.orm import Session

from trainyard.contract.failpoints import failpoint
from trainyard.contract.messages import ErrorCard, ExitReport
from trainyard.contract.prepared import PreparedCorpus, find_prepared
from trainyard.contract.status import CorpusStatus, Desired, JobStatus, Reason
from trainyard.service.corpora import registry
from trainyard.service.corpora.files import delete_corpus_files, delete_run_directory
from trainyard.service.db.models import CorpusRow
from trainyard.service.ingest.parsing import contiguous, parse_event
from trainyard.service.jobs import repository
from trainyard.service.launch.base import (
    LOCAL,
    AttemptRef,
    AttemptState,
    AttemptStatus,
    Launch,
    Launcher,
    LauncherUnavailable,
    LaunchRefused,
)
from trainyard.service.scheduler.preparations import (
    InspectPreparation,
    KillPreparation,
    MoveWaitingJob,
    Preparation,
    PreparationAction,
    Prepare,
    StopPreparation,
    was_unobserved,
)
from trainyard.service.scheduler.snapshot import SchedulerMemory
from trainyard.service.timing import Timing

MAX_LINES = 2000

log = logging.getLogger("trainyard")


class PreparationExecutor:
    """Executes one action at a time. ``write`` opens a transaction that only the leader may use."""

    def __init__(
        self,
        write: Callable[[], AbstractContextManager[Session]],
        still_leads: Callable[[], bool],
        launcher: Launcher,
        memory: SchedulerMemory,
        clock: Callable[[], datetime],
        cache: Path,
        home: Path,
        timing: Timing,
    ) -> None:
        self._write = write
        self._still_leads = still_leads
        self._launcher = launcher
        self._memory = memory
        self._clock = clock
        self._cache = cache
        self._home = home
        self._timing = timing

    def execute(self, action: PreparationAction) -> bool:
        """Execute ``action``. Return True if the next round is due at once."""
        match action:
            case Prepare():
                return self._prepare(action)
            case InspectPreparation():
                return self._inspect(action.preparation)
            case StopPreparation():
                return self._stop(action.preparation)
            case KillPreparation():
                return self._kill(action.preparation, action.reason)
            case MoveWaitingJob():
                return self._move(action)
            case _:
                assert_never(action)

    @failpoint("launch.scheduler.prepare")
    def _prepare(self, action: Prepare) -> bool:
        launch = self._claim(action)
        if launch is None or not self._still_leads():
            # If another service leads now, it finds that the attempt was never launched.
            return False
        self._memory.inspected_at[action.corpus_id] = self._clock()
        log.info("preparing a corpus", extra=_fields(launch.name))
        try:
            self._launcher.start(launch)
        except LauncherUnavailable as error:
            # It may have been launched. The next inspection finds out.
            log.warning("launch not confirmed: %s", error, extra=_fields(launch.name))
            return False
        except Exception as error:
            if not isinstance(error, LaunchRefused):
                log.exception("the launcher failed", extra=_fields(launch.name))
                self._launcher.kill(launch.name)  # it may have started the agent
            hint = error.hint if isinstance(error, LaunchRefused) else None
            message = f"the preparation of the corpus could not be launched: {error}"
            self._close_crashed(launch.name, ErrorCard(code=Reason.LAUNCH_FAILED, message=message, hint=hint))
            return True
        self._confirm(launch.name)
        return False

    def _claim(self, action: Prepare) -> Launch | None:
        with self._write() as session:
            row = registry.lock(session, action.corpus_id)
            return registry.claim(session, row, action.processes, self._clock()) if row is not None else None

    def _confirm(self, name: AttemptRef) -> None:
        now = self._clock()
        with self._write() as session:
            row = _locked(session, name)
            if row is not None and row.launched_at is None:
                row.launched_at = now
                # A cluster may let it wait in its queue for days.
                row.heard_at = now if name.launcher == LOCAL else None

    def _inspect(self, preparation: Preparation) -> bool:
        if was_unobserved(preparation, self._clock()):
            self._restart_stall(preparation.name)
        self._memory.inspected_at[preparation.id] = self._clock()
        acked = self._read_progress(preparation.name, preparation.acked_seq)
        status = self._launcher.find(preparation.name)
        if not self._still_leads():
            return False
        match status.state:
            case AttemptState.UNKNOWN:
                return False
            case AttemptState.ALIVE:
                if not preparation.launched:
                    self._confirm(preparation.name)
                return False
            case AttemptState.ENDED:
                return self._handle_ended(preparation.name, status, acked)
            case AttemptState.ORPHANED:
                log.warning("a preparation has lost its agent", extra=_fields(preparation.name))
                self._launcher.kill(preparation.name)
                return self._handle_ended(preparation.name, self._launcher.find(preparation.name), acked)
            case AttemptState.ABSENT:
                return self._handle_absent(preparation, acked)
            case _:
                assert_never(status.state)

    def _restart_stall(self, name: AttemptRef) -> None:
        """Let the time without a report begin now."""
        with self._write() as session:
            row = _locked(session, name)
            if row is not None and row.heard_at is not None:
                row.heard_at = self._clock()

    def _read_progress(self, name: AttemptRef, acked: int) -> int:
        """Store the lines of the outbox after ``acked``, and return the number of the last one."""
        while lines := self._launcher.unacked_lines(name, acked, MAX_LINES):
            events = [parse_event(line) for line in contiguous(lines, acked)]
            if not events:
                break
            with self._write() as session:
                row = _locked(session, name)
                if row is None or row.acked_seq != acked:
                    break
                registry.record_progress(session, row, events, self._clock())
                acked = row.acked_seq
        return acked

    def _handle_ended(self, name: AttemptRef, status: AttemptStatus, acked: int) -> bool:
        if status.state is not AttemptState.ENDED or status.report is None:
            return False
        self._read_progress(name, acked)
        self._close(name, status.report)
        return True

    def _handle_absent(self, preparation: Preparation, acked: int) -> bool:
        # A slow process or a former leader may still launch it. kill() closes the attempt first, so that an agent that
        # starts late exits at once.
        self._launcher.kill(preparation.name)
        status = self._launcher.find(preparation.name)
        if status.state is not AttemptState.ABSENT:
            return self._handle_ended(preparation.name, status, acked)
        if preparation.launched:
            card = ErrorCard(code=Reason.AGENT_LOST, message="nothing is left of the process that prepared the corpus")
            self._close_crashed(preparation.name, card)
            return True
        message = "the launch did not happen"
        report = ExitReport(
            outcome="stopped", step=0, reason=Reason.USER, message=message, last_seq=0, ended_at=self._clock()
        )
        self._close(preparation.name, report)
        return True

    def _close_crashed(self, name: AttemptRef, card: ErrorCard) -> None:
        report = ExitReport(
            outcome="crashed",
            step=0,
            reason=Reason(card.code),
            message=card.message,
            error=card,
            last_seq=0,
            ended_at=self._clock(),
        )
        self._close(name, report)

    def _close(self, name: AttemptRef, report: ExitReport) -> None:
        with self._write() as session:
            row = _locked(session, name)
            if row is None:
                return
            parts = registry.parts_of(row)
        prepared = find_prepared(self._cache, parts) if report.outcome == "completed" else None
        deleted: PreparedCorpus | None = None
        with self._write() as session:
            row = _locked(session, name)
            if row is None:
                return
            registry.close(session, row, report, prepared, self._clock(), self._timing)
            is_deleted = row.deleted and row.status != CorpusStatus.PREPARING
            if is_deleted:
                deleted = registry.unshared(session, row)
                session.execute(delete(CorpusRow).where(CorpusRow.id == row.id))
        if is_deleted:
            delete_corpus_files(self._cache, deleted)
            delete_run_directory(self._home, name.job_id)

    def _stop(self, preparation: Preparation) -> bool:
        with self._write() as session:
            row = _locked(session, preparation.name)
            if row is None or row.status != CorpusStatus.PREPARING or registry.is_wanted(session, row):
                return False
            row.asked_at = self._clock()
        with contextlib.suppress(LauncherUnavailable):  # the kill follows
            self._launcher.stop(preparation.name)
        return False

    def _kill(self, preparation: Preparation, reason: Reason) -> bool:
        log.warning("killing a preparation: %s", reason, extra=_fields(preparation.name))
        self._launcher.kill(preparation.name)
        status = self._launcher.find(preparation.name)
        if status.state is not AttemptState.ENDED or status.report is None:
            return False
        report = status.report
        if reason is Reason.HUNG and report.outcome != "completed":
            message = "the preparation of the corpus made no progress, and its agent did not answer"
            card = ErrorCard(code=Reason.HUNG, message=message)
            report = report.model_copy(
                update={"outcome": "crashed", "reason": reason, "message": message, "error": card}
            )
        self._read_progress(preparation.name, preparation.acked_seq)
        self._close(preparation.name, report)
        return True

    def _move(self, action: MoveWaitingJob) -> bool:
        with self._write() as session:
            row = registry.lock(session, action.corpus_id)
            job = repository.lock(session, action.job_id)
            is_prepared = row is not None and row.status == CorpusStatus.PREPARING
            if action.to is JobStatus.PREPARING:
                if row is None or not is_prepared or job.status != JobStatus.QUEUED or job.desired != Desired.RUN:
                    return False
                registry.begin(session, job, row, self._clock())
            elif not is_prepared:
                registry.release_stray(session, job, self._clock())
        return True


def _locked(session: Session, name: AttemptRef) -> CorpusRow | None:
    """Return the corpus, or None if it is gone or has another attempt."""
    row = registry.lock(session, name.job_id)
    return row if row is not None and row.attempt == name.number else None


def _fields(name: AttemptRef) -> dict[str, object]:
    return {"corpus_id": name.job_id, "attempt": name.number}
