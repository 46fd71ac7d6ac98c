"""Runs attempts on a Slurm cluster: one batch job for each, one agent on each of its nodes.

Slurm is the engine; what is ours is to submit no attempt twice, to find it again, and to believe nothing that nobody
said. All attempts of a job have one name in Slurm, and each has its own in the comment: Slurm's ``singleton`` runs one
of them at a time, also where two services, or one that was killed and started again, have submitted it twice.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainyard.contract.failpoints import failpoint
from trainyard.contract.messages import (
    ErrorCard,
    ExitReport,
    RunSettings,
    read_message,
)
from trainyard.contract.rundir import (
    UNSEEN,
    AttemptDir,
    read_json,
    write_atomically,
    write_json,
)
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.service.launch import post_mortem
from trainyard.service.launch.base import (
    AttemptRef,
    AttemptState,
    AttemptStatus,
    Launch,
    LauncherUnavailable,
    LaunchRefused,
    Placement,
)
from trainyard.service.launch.environment import WORKER_AGENT, WorkerEnvironment
from trainyard.service.launch.files import AttemptFiles
from trainyard.service.launch.slurm import cli
from trainyard.service.launch.slurm.cli import QueueCache
from trainyard.service.launch.slurm.config import SlurmSetup
from trainyard.service.launch.slurm.queue import CONFIGURING, SlurmJob
from trainyard.service.launch.slurm.script import (
    SbatchScript,
    job_name,
    merge_options,
    render,
)

SLURM = "slurm"
PREFIX = job_name("")
END_SECONDS = 5.0
STOP_SIGNAL = signal.SIGURG.value
"""Some clusters signal every process of a job, and torchrun takes SIGTERM for its own end: it gives ranks no time to
save. Who does not listen for this one does not notice it."""

ENDS: dict[str, tuple[Reason, str]] = {
    "NODE_FAIL": (Reason.NODE_LOST, "Slurm lost a node of the attempt"),
    "BOOT_FAIL": (Reason.NODE_LOST, "a node of the attempt did not boot"),
    "TIMEOUT": (Reason.TIME_LIMIT, "its time on the cluster was over, and nothing was saved at the end"),
    "DEADLINE": (Reason.TIME_LIMIT, "its deadline on the cluster was over, and nothing was saved at the end"),
    "PREEMPTED": (Reason.PREEMPTED, "Slurm gave its nodes to another job"),
    "CANCELLED": (Reason.TERMINATED, "somebody cancelled it in Slurm"),
    "OUT_OF_MEMORY": (Reason.HOST_OUT_OF_MEMORY, "Slurm ended it for want of memory; ask for more with `--mem`"),
}
"""Slurm's word on an attempt that left none itself."""

SHARED_DIRECTORY = (
    "Mount the directory that the service keeps its home in on every node that Slurm may choose, or exclude the node."
)
NO_SHARED_DIRECTORY = (
    "Not even a log was written: do all nodes have {path}, under this path, and may the service's user write there?"
)


class SlurmLauncher:
    """A launcher whose facts are Slurm's queue and the files of the attempt. No answer is no fact."""

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
        """Submit the attempt, unless Slurm has it already: a service that was killed may have submitted it."""
        attempt = self._files.attempt(launch.name)
        known = self._jobs(launch.name)
        if attempt.closed.exists() or _of(known, launch.name) is not None:
            return
        for leftover in known:
            if not leftover.ended:
                cli.cancel(leftover)  # of an attempt that is over: the next would wait for it
        try:
            self._files.write(launch)
            write_atomically(attempt.batch, render(self._batch(launch, attempt)).encode())
        except OSError as error:
            raise LaunchRefused(f"the attempt could not be written down: {error}") from error
        try:
            number = cli.submit(attempt.batch, self._variables(launch))
        finally:
            self._changed_at = self._monotonic()
        self._note_submission(attempt, number)

    def find(self, name: AttemptRef) -> AttemptStatus:
        """What its files and the queue say. exit.json is written only once nothing of it lives."""
        attempt = self._files.attempt(name)
        report = read_message(ExitReport, attempt.exit)
        if report is not None:
            return AttemptStatus(AttemptState.ENDED, report)
        try:
            job = _of(self._jobs(name), name)
            if job is None:
                self._require_same_cluster(attempt)
        except LauncherUnavailable as trouble:
            return AttemptStatus(AttemptState.UNKNOWN, silence=str(trouble))
        if job is not None and not job.ended:
            return AttemptStatus(AttemptState.ALIVE, placement=self._placement(job, attempt))
        # Looked at once more: an agent that ended between the two looks has published its report by now.
        report = read_message(ExitReport, attempt.exit)
        if report is None and job is None and not attempt.started.exists() and not attempt.submitted.exists():
            return AttemptStatus(AttemptState.ABSENT)
        return AttemptStatus(AttemptState.ENDED, report or _deduced(attempt, job.state if job is not None else None))

    def find_alive(self, _names: Sequence[AttemptRef]) -> set[AttemptRef]:
        """None: `find` reads a list of the queue that was asked for once, and has more to say."""
        return set()

    def stop(self, name: AttemptRef) -> None:
        """The wish for the ranks, and a signal to the agents; an attempt that still waits is taken out of the queue."""
        self._files.request_stop(name)
        job = _of(self._jobs(name), name)
        if job is None or job.ended:
            return
        if job.pending:  # it may run by now: then it is told, and not taken out
            cli.cancel(job, *(() if job.state == CONFIGURING else ("--state=PENDING",)))
        cli.cancel(job, f"--signal={STOP_SIGNAL}")
        self._changed_at = self._monotonic()

    def save(self, name: AttemptRef) -> None:
        """Leave the wish where rank 0 looks for it at each step."""
        self._files.request_save(name)

    def kill(self, name: AttemptRef) -> None:
        """SIGKILL to all of it, and let nothing of it begin any more. Where Slurm does not answer, `find` says so."""
        with contextlib.suppress(OSError):  # a full disk must not keep us from ending what lives
            self._files.close(name)
        deadline = self._monotonic() + END_SECONDS
        with contextlib.suppress(LauncherUnavailable):
            while (job := _of(self._jobs(name), name)) is not None and not job.ended:
                if not job.completing:
                    cli.cancel(job, "--signal=KILL", "--full")
                    cli.cancel(job)
                self._changed_at = self._monotonic()
                if self._monotonic() > deadline:
                    return
                time.sleep(0.2)

    def settle(self, name: AttemptRef, settings: RunSettings) -> None:
        """Leave them where rank 0 looks for them."""
        self._files.settle(name, settings)

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Lines of the outbox that the service does not have yet."""
        return self._files.unacked_lines(name, after_seq, limit)

    def _jobs(self, name: AttemptRef) -> list[SlurmJob]:
        """All attempts of the job that Slurm knows, as they are after our own last change. Raises NoAnswer.

        Otherwise an answer of a moment ago will do, and of longer ago where squeue takes long: to insist on one of this
        instant would never be heard there. What is submitted twice all the same does not run twice.
        """
        since = max(self._changed_at, self._monotonic() - self._queue.fresh_seconds)
        return [job for job in self._queue.jobs(since) if job.name == job_name(name.job_id)]

    def _placement(self, job: SlurmJob, attempt: AttemptDir) -> Placement | None:
        """None for one that is about to end: Slurm names only the nodes then that have not ended it yet."""
        if job.completing:
            return None
        return job.placement(_ranks_per_node(attempt), tailed=self._setup.reports == "directory")

    def _note_submission(self, attempt: AttemptDir, number: str | None) -> None:
        """Leave word of who was asked: another cluster, or another user, would know nothing of it."""
        asked: dict[str, object] = {"slurm_job_id": number, "uid": os.getuid(), "at": datetime.now(UTC).isoformat()}
        with contextlib.suppress(LauncherUnavailable):
            asked["cluster"] = self._asked_cluster()
        with contextlib.suppress(OSError):  # we look in the queue all the same
            write_json(attempt.submitted, asked)

    def _require_same_cluster(self, attempt: AttemptDir) -> None:
        """Raise NoAnswer where the queue that does not have the attempt is not the one it was submitted to, as us."""
        asked = _submission(attempt)
        if asked.get("uid", os.getuid()) != os.getuid():
            raise LauncherUnavailable(
                f"the attempt was submitted by user {asked['uid']}, and this service runs as another one"
            )
        if "cluster" in asked and asked["cluster"] != self._asked_cluster():
            raise LauncherUnavailable(
                f"the attempt is on cluster {asked['cluster']}, and SLURM_CONF leads to {self._cluster}"
            )

    def _asked_cluster(self) -> str:
        if self._cluster is None:
            self._cluster = cli.cluster_name()
        return self._cluster

    def _batch(self, launch: Launch, attempt: AttemptDir) -> SbatchScript:
        resources = launch.spec.resources
        return SbatchScript(
            name=launch.name,
            attempt=attempt,
            resources=resources,
            options=merge_options(resources.slurm, self._setup.defaults),
            gpus=device_on_nodes(launch.spec, self._setup) == "cuda",
            warning=self._setup.warning,
            agent=self._agent,
        )

    def _variables(self, launch: Launch) -> dict[str, str]:
        """The job's environment: sbatch passes its own on. Which GPUs there are Slurm says on each node."""
        variables = {**self._environment.of(launch), **cli.slurm_environment()}
        for here_only in ("CUDA_VISIBLE_DEVICES", "TMPDIR"):
            variables.pop(here_only, None)
        if self._setup.reports == "directory":
            variables["TRAINYARD_REPORT_URL"] = ""
        elif self._setup.url is not None:
            variables["TRAINYARD_REPORT_URL"] = self._setup.url
            del variables["TRAINYARD_SERVICE_FILE"]  # the address in it may be good on the service's own host only
        return variables


def device_on_nodes(spec: JobSpec, setup: SlurmSetup) -> str:
    """``cuda`` or ``cpu``: what the spec's device means on the cluster's nodes."""
    return setup.device if spec.resources.device == "auto" else spec.resources.device.partition(":")[0]


def _of(jobs: Sequence[SlurmJob], name: AttemptRef) -> SlurmJob | None:
    """The attempt's own submission; of several the one that has not ended, then the newest."""
    own = [job for job in jobs if job.comment == str(name)]
    return max(own, key=lambda job: (not job.ended, int(job.id)), default=None)


def _submission(attempt: AttemptDir) -> dict[str, Any]:
    """What was written down of it; nothing where that cannot be read."""
    try:
        asked = read_json(attempt.submitted)
    except (OSError, ValueError):
        return {}
    return asked if isinstance(asked, dict) else {}


def _ranks_per_node(attempt: AttemptDir) -> int:
    try:
        return JobSpec.model_validate_json(attempt.spec.read_bytes()).resources.nproc_per_node
    except (OSError, ValueError):
        return 1


def _deduced(attempt: AttemptDir, state: str | None) -> ExitReport:
    """The end of an attempt that Slurm has no longer, or has ended, and whose agent left no report.

    What was asked for is ours to remember: Slurm calls a run that was stopped failed, and one that was ended cancelled.
    """
    said = post_mortem.report_from_outcome(attempt)
    if said is not None:
        return said
    began = attempt.started.exists()
    cancelled = state in ("CANCELLED", None)  # Slurm forgets what has ended, after a while that is the cluster's to say
    if cancelled and attempt.stop.exists() and not began:
        return _on_request(attempt, "stopped", "stopped while it waited in Slurm; nothing of it had begun")
    if cancelled and (attempt.closed.exists() or (state is not None and attempt.stop.exists())):
        return _on_request(attempt, "killed", "ended in Slurm as asked")
    if (unseen := _unseen(attempt)) is not None:
        card = ErrorCard(code=Reason.LAUNCH_FAILED, message=unseen, hint=SHARED_DIRECTORY)
        return post_mortem.crash_report(
            attempt, card, post_mortem.tail_lines(attempt), post_mortem.last_activity(attempt)
        )
    if state in ENDS:
        return post_mortem.lost_report(attempt, *ENDS[state])
    if not began:
        return _never_began(attempt, state)
    gone = f"Slurm says {state}" if state is not None else "Slurm knows nothing of it any more"
    return post_mortem.lost_report(
        attempt, Reason.AGENT_LOST, f"the attempt's agent is gone and left no report; {gone}"
    )


def _unseen(attempt: AttemptDir) -> str | None:
    """What the agent of a node said that does not have the home; the cluster has ended those of the others then."""
    said = _last_words(attempt).splitlines()
    return next((line[:500] for line in said if line.startswith(UNSEEN)), None)


def _last_words(attempt: AttemptDir) -> str:
    """The end of Slurm's own log of it."""
    try:
        return attempt.cluster_log.read_bytes()[-post_mortem.LOG_TAIL_BYTES :].decode(errors="replace")
    except OSError:
        return ""


def _on_request(attempt: AttemptDir, outcome: str, message: str) -> ExitReport:
    return ExitReport.model_validate(
        {
            "outcome": outcome,
            "step": attempt.read_step() or 0,
            "reason": Reason.USER,
            "message": message,
            "last_seq": post_mortem.tail_lines(attempt),
            "ended_at": datetime.now(UTC),
        }
    )


def _never_began(attempt: AttemptDir, state: str | None) -> ExitReport:
    """Slurm has run it and no agent has said a word: why is in Slurm's own log of it."""
    tail = _last_words(attempt)
    last = next(iter(reversed(tail.strip().splitlines())), f"Slurm says {state or 'nothing'}")
    message = f"the attempt's agent did not begin on the cluster: {last[:500]}"
    hint = None if attempt.cluster_log.exists() else NO_SHARED_DIRECTORY.format(path=attempt.path)
    card = ErrorCard(code=Reason.LAUNCH_FAILED, message=message, hint=hint, traceback=tail or None)
    return post_mortem.crash_report(attempt, card, post_mortem.tail_lines(attempt), datetime.now(UTC))
