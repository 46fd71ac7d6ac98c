"""The launcher for Slurm: one batch job for each attempt, with one agent on each of its nodes.

Slurm does the scheduling. This launcher submits no attempt twice, finds it again, and concludes nothing from silence.
All attempts of a job share one name in Slurm, and each has its own comment. Slurm's ``singleton`` dependency runs one
of them at a time, even if two services, or one that was killed and restarted, have submitted it twice.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from trainyard.contract.failpoints import failpoint
from trainyard.contract.messages import ErrorCard, ExitReport, RunSettings, read_message
from trainyard.contract.rundir import UNSEEN, AttemptDir, read_json, write_atomically, write_json
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.service.launch import post_mortem
from trainyard.service.launch.base import (
    AttemptPlacement,
    AttemptRef,
    AttemptState,
    AttemptStatus,
    Launch,
    LauncherUnavailable,
    LaunchRefused,
)
from trainyard.service.launch.environment import WORKER_AGENT, WorkerEnvironment
from trainyard.service.launch.files import AttemptFiles
from trainyard.service.launch.slurm import cli
from trainyard.service.launch.slurm.cli import QueueCache
from trainyard.service.launch.slurm.config import SlurmSetup
from trainyard.service.launch.slurm.queue import CONFIGURING, SlurmJob
from trainyard.service.launch.slurm.script import SbatchScript, job_name, merge_options, preparation_options, render

SLURM = "slurm"
PREFIX = job_name("")
KILL_SECONDS = 5.0
# Not SIGTERM: some clusters signal every process of a job, and on SIGTERM torchrun ends the ranks without time to save.
# SIGURG is ignored by default, so processes that do not handle it are not affected.
STOP_SIGNAL = signal.SIGURG.value

# Slurm's final state -> reason and message, for an attempt that left no report.
EXIT_BY_STATE: dict[str, tuple[Reason, str]] = {
    "NODE_FAIL": (Reason.NODE_LOST, "Slurm lost a node of the attempt"),
    "BOOT_FAIL": (Reason.NODE_LOST, "a node of the attempt did not boot"),
    "TIMEOUT": (Reason.TIME_LIMIT, "it reached its time limit on the cluster, and nothing was saved at the end"),
    "DEADLINE": (Reason.TIME_LIMIT, "it reached its deadline on the cluster, and nothing was saved at the end"),
    "PREEMPTED": (Reason.PREEMPTED, "Slurm gave its nodes to another job"),
    "CANCELLED": (Reason.TERMINATED, "it was cancelled in Slurm"),
    "OUT_OF_MEMORY": (Reason.HOST_OUT_OF_MEMORY, "Slurm ended it: out of memory; request more with `--mem`"),
}

SHARED_DIRECTORY = (
    "Mount the directory that the service keeps its home in on every node that Slurm may choose, or exclude the node."
)
NO_SHARED_DIRECTORY = (
    "No log was written: do all nodes have {path} under this path, and may the service's user write there?"
)


class SlurmLauncher:
    """A launcher that relies on Slurm's queue and on the attempt's files. No answer means UNKNOWN."""

    def __init__(
        self,
        home: Path,
        corpus_cache: Path,
        setup: SlurmSetup,
        data_roots: Sequence[Path] = (),
        save_roots: Sequence[Path] = (),
        agent: tuple[str, ...] = WORKER_AGENT,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setup = setup
        self._agent = agent
        self._monotonic = monotonic
        self._environment = WorkerEnvironment(home, corpus_cache, data_roots, save_roots)
        self._files = AttemptFiles(home, corpus_cache)
        self._queue = QueueCache(lambda: cli.query_queue(PREFIX), monotonic)
        self._changed_at = float("-inf")
        self._cluster: str | None = None

    @failpoint("launch.slurm.start")
    def start(self, launch: Launch) -> None:
        """Submit the attempt, unless Slurm has it: a service that was killed may have submitted it."""
        attempt = self._files.attempt(launch.name)
        submissions = self._jobs(launch.name)
        if attempt.closed.exists() or _find_submission(submissions, launch.name) is not None:
            return
        for leftover in submissions:
            if not leftover.ended:
                cli.cancel(leftover)  # an earlier attempt's: `singleton` would make this one wait for it
        try:
            self._files.write(launch)
            write_atomically(attempt.batch, render(self._batch(launch, attempt)).encode())
        except OSError as error:
            raise LaunchRefused(f"the files of the attempt could not be written: {error}") from error
        try:
            number = cli.submit(attempt.batch, self._variables(launch))
        finally:
            self._changed_at = self._monotonic()
        self._note_submission(attempt, number)

    def find(self, name: AttemptRef) -> AttemptStatus:
        """Return the attempt's state from its files and the queue."""
        attempt = self._files.attempt(name)
        report = read_message(ExitReport, attempt.exit)
        if report is not None:
            return AttemptStatus(AttemptState.ENDED, report)
        try:
            job = _find_submission(self._jobs(name), name)
            if job is None:
                self._require_same_cluster(attempt)
        except LauncherUnavailable as error:
            return AttemptStatus(AttemptState.UNKNOWN, silence=str(error))
        if job is not None and not job.ended:
            return AttemptStatus(AttemptState.ALIVE, placement=self._placement(job, attempt))
        # Read again: an agent that ended between the two checks has written its report by now. An NFS client may
        # remember for a minute that the file was missing, unless the directory is opened (close-to-open consistency).
        with contextlib.suppress(OSError):
            os.listdir(attempt.path)
        report = read_message(ExitReport, attempt.exit)
        if report is None and job is None and not attempt.started.exists() and not attempt.submitted.exists():
            return AttemptStatus(AttemptState.ABSENT)
        return AttemptStatus(
            AttemptState.ENDED, report or _inferred_report(attempt, job.state if job is not None else None)
        )

    def find_alive(self, _names: Sequence[AttemptRef]) -> set[AttemptRef]:
        return set()  # `find` reads a cached queue anyway, and needs the placement

    def stop(self, name: AttemptRef) -> None:
        """Write the stop file and signal the agents. A job that is still pending is cancelled."""
        self._files.request_stop(name)
        job = _find_submission(self._jobs(name), name)
        if job is None or job.ended:
            return
        if job.pending:  # --state=PENDING: it may run by now, and then it must be signalled, not cancelled
            cli.cancel(job, *(() if job.state == CONFIGURING else ("--state=PENDING",)))
        cli.cancel(job, f"--signal={STOP_SIGNAL}")
        self._changed_at = self._monotonic()

    def save(self, name: AttemptRef) -> None:
        self._files.request_save(name)

    def kill(self, name: AttemptRef) -> None:
        """SIGKILL the whole job and let nothing of it start. If Slurm does not answer, `find` shows that."""
        with contextlib.suppress(OSError):  # a full disk must not prevent the kill
            self._files.close(name)
        deadline = self._monotonic() + KILL_SECONDS
        with contextlib.suppress(LauncherUnavailable):
            while (job := _find_submission(self._jobs(name), name)) is not None and not job.ended:
                if not job.completing:
                    cli.cancel(job, "--signal=KILL", "--full")
                    cli.cancel(job)
                self._changed_at = self._monotonic()
                if self._monotonic() > deadline:
                    return
                time.sleep(0.2)

    def write_settings(self, name: AttemptRef, settings: RunSettings) -> None:
        self._files.write_settings(name, settings)

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        return self._files.unacked_lines(name, after_seq, limit)

    def _jobs(self, name: AttemptRef) -> list[SlurmJob]:
        # All attempts of the job that Slurm knows. The answer must be newer than our own last change. Else a cached
        # one will do, since squeue may take long; if it causes a second submission, `singleton` runs only one of them.
        since = max(self._changed_at, self._monotonic() - self._queue.fresh_seconds)
        return [job for job in self._queue.jobs(since) if job.name == job_name(name.job_id)]

    def _placement(self, job: SlurmJob, attempt: AttemptDir) -> AttemptPlacement | None:
        if job.completing:  # Slurm now lists only the nodes that have not finished yet
            return None
        return job.placement(_ranks_per_node(attempt), tailed=self._setup.reports == "directory")

    def _note_submission(self, attempt: AttemptDir, number: str | None) -> None:
        # Another cluster, or another user, would not know the job: `find` must not take that for its end.
        record: dict[str, object] = {"slurm_job_id": number, "uid": os.getuid(), "at": datetime.now(UTC).isoformat()}
        with contextlib.suppress(LauncherUnavailable):
            record["cluster"] = self._cluster_name()
        with contextlib.suppress(OSError):  # the queue is queried in any case
            write_json(attempt.submitted, record)

    def _require_same_cluster(self, attempt: AttemptDir) -> None:
        submission = _read_submission(attempt)
        if submission.get("uid", os.getuid()) != os.getuid():
            raise LauncherUnavailable(
                f"the attempt was submitted by user {submission['uid']}, and this service runs as another user"
            )
        if "cluster" in submission and submission["cluster"] != self._cluster_name():
            raise LauncherUnavailable(
                f"the attempt is on cluster {submission['cluster']}, and SLURM_CONF points to {self._cluster}"
            )

    def _cluster_name(self) -> str:
        if self._cluster is None:
            self._cluster = cli.cluster_name()
        return self._cluster

    def _batch(self, launch: Launch, attempt: AttemptDir) -> SbatchScript:
        resources = launch.spec.resources
        options = merge_options(resources.slurm, self._setup.defaults)
        return SbatchScript(
            name=launch.name,
            attempt=attempt,
            resources=resources,
            options=options if launch.task is None else preparation_options(options),
            gpus=device_on_nodes(launch.spec, self._setup) == "cuda",
            warning=self._setup.warning,
            agent=self._agent,
        )

    def _variables(self, launch: Launch) -> dict[str, str]:
        # sbatch passes its own environment to the job. On each node, Slurm itself sets which GPUs the job has.
        variables = {**self._environment.of(launch), **cli.slurm_environment()}
        for name in ("CUDA_VISIBLE_DEVICES", "TMPDIR"):
            variables.pop(name, None)
        if self._setup.reports == "directory":
            variables["TRAINYARD_REPORT_URL"] = ""
        elif self._setup.url is not None:
            variables["TRAINYARD_REPORT_URL"] = self._setup.url
            del variables["TRAINYARD_SERVICE_FILE"]  # its address may be valid on the service's host only
        return variables


def device_on_nodes(spec: JobSpec, setup: SlurmSetup) -> str:
    """Return ``cuda`` or ``cpu``: what the spec's device means on the cluster's nodes."""
    return setup.device if spec.resources.device == "auto" else spec.resources.device.partition(":")[0]


def _find_submission(jobs: Sequence[SlurmJob], name: AttemptRef) -> SlurmJob | None:
    # Of several submissions the one that has not ended, then the newest.
    own = [job for job in jobs if job.comment == str(name)]
    return max(own, key=lambda job: (not job.ended, int(job.id)), default=None)


def _read_submission(attempt: AttemptDir) -> dict[str, Any]:
    try:
        submission = read_json(attempt.submitted)
    except (OSError, ValueError):
        return {}
    return submission if isinstance(submission, dict) else {}


def _ranks_per_node(attempt: AttemptDir) -> int:
    try:
        return JobSpec.model_validate_json(attempt.spec.read_bytes()).resources.nproc_per_node
    except (OSError, ValueError):
        return 1


def _inferred_report(attempt: AttemptDir, state: str | None) -> ExitReport:
    if (report := post_mortem.report_from_outcome(attempt)) is not None:
        return report
    # Slurm calls a stopped run FAILED and a killed one CANCELLED, so the attempt's own files are read first.
    started = attempt.started.exists()
    cancelled = state in ("CANCELLED", None)  # None: Slurm forgets an ended job after MinJobAge
    if cancelled and attempt.stop.exists() and not started:
        return _requested_exit(attempt, "stopped", "stopped while it waited in Slurm; nothing of it had started")
    if cancelled and (attempt.closed.exists() or (state is not None and attempt.stop.exists())):
        return _requested_exit(attempt, "killed", "ended in Slurm as asked")
    if (missing_home := _missing_home(attempt)) is not None:
        card = ErrorCard(code=Reason.LAUNCH_FAILED, message=missing_home, hint=SHARED_DIRECTORY)
        return post_mortem.crash_report(
            attempt, card, post_mortem.count_lines(attempt), post_mortem.last_activity(attempt)
        )
    if state in EXIT_BY_STATE:
        return post_mortem.lost_report(attempt, *EXIT_BY_STATE[state])
    if not started:
        return _not_started_report(attempt, state)
    state_text = f"Slurm reports {state}" if state is not None else "Slurm does not know it any more"
    return post_mortem.lost_report(
        attempt, Reason.AGENT_LOST, f"the attempt's agent is gone and left no report; {state_text}"
    )


def _missing_home(attempt: AttemptDir) -> str | None:
    # The agent of a node without the home says so in the job's log; Slurm then ends the agents of the other nodes.
    return next((line[:500] for line in _log_tail(attempt).splitlines() if line.startswith(UNSEEN)), None)


def _log_tail(attempt: AttemptDir) -> str:
    try:
        return attempt.cluster_log.read_bytes()[-post_mortem.LOG_TAIL_BYTES :].decode(errors="replace")
    except OSError:
        return ""


def _requested_exit(attempt: AttemptDir, outcome: Literal["stopped", "killed"], message: str) -> ExitReport:
    step, lines, now = attempt.read_step() or 0, post_mortem.count_lines(attempt), datetime.now(UTC)
    return ExitReport(outcome=outcome, step=step, reason=Reason.USER, message=message, last_seq=lines, ended_at=now)


def _not_started_report(attempt: AttemptDir, state: str | None) -> ExitReport:
    tail = _log_tail(attempt)
    last = next(iter(reversed(tail.strip().splitlines())), f"Slurm reports {state or 'nothing'}")
    message = f"the attempt's agent did not begin on the cluster: {last[:500]}"
    hint = None if attempt.cluster_log.exists() else NO_SHARED_DIRECTORY.format(path=attempt.path)
    card = ErrorCard(code=Reason.LAUNCH_FAILED, message=message, hint=hint, traceback=tail or None)
    return post_mortem.crash_report(attempt, card, post_mortem.count_lines(attempt), datetime.now(UTC))
