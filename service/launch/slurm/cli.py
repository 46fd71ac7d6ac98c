"""Slurm's commands, each with a time-out. Nothing is concluded from a command that does not answer in time."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from trainyard.contract.failpoints import failpoint
from trainyard.service.launch.base import LauncherUnavailable, LaunchRefused
from trainyard.service.launch.slurm.queue import SlurmJob, parse_squeue

SUBMIT_SECONDS = 10.0
CANCEL_SECONDS = 10.0
QUERY_SECONDS = 20.0
NAME_SECONDS = 3.0
MAX_WAIT_SECONDS = 2.0  # How long a caller waits for the queue. The query continues in the background.
FRESH_SECONDS = 1.0
# An answer stays valid for this many times the query's duration, so that a slow controller is not queried without a
# break.
FRESH_FACTOR = 10.0

# Parts of messages after which it is unknown whether the controller has carried out the request, or that report a
# problem of this host: they say nothing about the job.
UNREACHABLE = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "zero bytes were transmitted",
    "temporarily unable to accept job",
    "communication connection failure",
    "slurmctld is in standby",
    "slurm backup controller in standby",
    "unable to confirm allocation",
    "connection timed out",
    "protocol authentication error",
    "transport endpoint",
    "munge",
    "invalid authentication credential",
    "could not establish a configuration source",
)

# Part of sbatch's error message -> what to do.
HINTS: tuple[tuple[str, str], ...] = (
    ("invalid partition", "`sinfo` lists the partitions; resources.slurm.partition or TRAINYARD_SLURM_PARTITION."),
    ("invalid account", "resources.slurm.account or TRAINYARD_SLURM_ACCOUNT must be one that Slurm knows of its user."),
    ("invalid qos", "resources.slurm.qos or TRAINYARD_SLURM_QOS must be one that the account may use."),
    (
        "invalid generic resource",
        "The nodes have no such GPUs: resources.slurm.gpu_type, or TRAINYARD_SLURM_DEVICE=cpu.",
    ),
    ("invalid feature", "`sinfo -o %f` lists the features that resources.slurm.constraint may name."),
    ("submit limit", "Slurm takes no more of this user's jobs for now: resume the job once others have ended."),
    ("time limit", "Lower resources.slurm.time_limit: a run goes on after it, in its next attempt."),
    ("node count specification", "Lower resources.nnodes, or name another partition."),
    ("node configuration is not available", "No nodes have it all: lower nproc_per_node or nnodes, or ask for less."),
    ("more processors", "Lower resources.nproc_per_node: the partition's nodes have fewer cores."),
    ("memory specification", "Ask for less `--mem` in resources.slurm.extra."),
    ("cannot be run", "Slurm's commands must be in the PATH of the service."),
)


def slurm_environment() -> dict[str, str]:
    """Return the variables that locate Slurm's configuration and libraries."""
    names = ("SLURM_CONF", "LD_LIBRARY_PATH", "HOME")
    return {name: os.environ[name] for name in names if name in os.environ}


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> str:
    """Return the output of ``command``. Raises LauncherUnavailable, or LaunchRefused with Slurm's message."""
    try:
        process = subprocess.run(
            command,
            env={"PATH": os.environ.get("PATH", ""), **slurm_environment(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise LauncherUnavailable(
            f"{command[0]} did not answer within {seconds:g} s{_last_line(error.stderr)}"
        ) from error
    except OSError as error:
        raise _launch_refused(f"{command[0]} cannot be run: {error.strerror}") from error
    message = " ".join(process.stderr.split())
    if process.returncode == 0:
        return process.stdout
    if any(words in message.lower() for words in UNREACHABLE):
        raise LauncherUnavailable(f"{command[0]}: {message}")
    raise _launch_refused(message or f"{command[0]} ended with {process.returncode}")


def _last_line(message: bytes | str | None) -> str:
    # What a command printed while it retried: without munge, a login node reports that only there.
    text = message.decode(errors="replace") if isinstance(message, bytes) else message or ""
    lines = text.strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""


def _launch_refused(message: str) -> LaunchRefused:
    return LaunchRefused(message, next((hint for part, hint in HINTS if part in message.lower()), None))


@failpoint("launch.slurm.submit")
def submit(script: Path, environment: Mapping[str, str]) -> str | None:
    """Submit the script; return Slurm's job number, or None if the output has none. Raises as `run` does.

    ``environment`` is the job's. Some clusters add text of their own to the output.
    """
    message = run(["sbatch", "--parsable", str(script)], SUBMIT_SECONDS, environment)
    numbers = re.findall(r"^(\d+)(?:;\S*)?$", message, re.MULTILINE)
    return numbers[-1] if numbers else None


def cluster_name() -> str:
    """Return the name of the cluster that these commands address. Raises LauncherUnavailable."""
    try:
        message = run(["scontrol", "show", "config"], NAME_SECONDS)
    except LaunchRefused as error:
        raise LauncherUnavailable(str(error)) from error
    found = re.search(r"^ClusterName\s*=\s*(\S+)", message, re.MULTILINE)
    if found is None:
        raise LauncherUnavailable("scontrol names no cluster")
    return found.group(1)


def cancel(job: SlurmJob, *options: str) -> None:
    """Run ``scancel`` with ``options``. A job that has ended already is no error. Raises LauncherUnavailable."""
    try:
        run(["scancel", *options, job.id], CANCEL_SECONDS)
    except LaunchRefused as message:
        if "already" not in str(message).lower() and "invalid job id" not in str(message).lower():
            raise LauncherUnavailable(str(message)) from message


QueueQuery = Callable[[], list[SlurmJob]]


def query_queue(prefix: str) -> list[SlurmJob]:
    """Return the service's jobs, including those that Slurm still lists after their end. Raises LauncherUnavailable."""
    try:
        return parse_squeue(run(["squeue", "--json", "--me", "--states=all"], QUERY_SECONDS), prefix)
    except (LaunchRefused, ValueError) as error:
        raise LauncherUnavailable(str(error)) from error


class QueueCache:
    """Cache of `squeue` output, refreshed in a background thread so that a hung controller does not block callers."""

    def __init__(self, query: QueueQuery, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._query = query
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="squeue")
        self._pending: tuple[float, Future[tuple[list[SlurmJob], float]]] | None = None
        self._answer: tuple[float, list[SlurmJob]] | None = None
        self._query_seconds = 0.0
        self._error = "it was not asked yet"

    @property
    def fresh_seconds(self) -> float:
        """How old an answer may be for a caller that has changed nothing since."""
        return max(FRESH_SECONDS, FRESH_FACTOR * self._query_seconds)

    def jobs(self, since: float | None = None) -> list[SlurmJob]:
        """Return the queue as of ``since`` or later, by default `fresh_seconds` ago. Raises LauncherUnavailable."""
        oldest = self._monotonic() - self.fresh_seconds if since is None else since
        for _ in range(2):  # the query that is running may have started too early
            if self._answer is not None and self._answer[0] > oldest:
                break
            self._refresh()
        if self._answer is None or self._answer[0] <= oldest:
            raise LauncherUnavailable(f"Slurm does not answer: {self._error}")
        return self._answer[1]

    def _refresh(self) -> None:
        with self._lock:
            if self._pending is None:
                self._pending = self._monotonic(), self._threads.submit(self._timed_query)
            began, future = self._pending
            timeout = max(0.0, began + MAX_WAIT_SECONDS - self._monotonic())
            if wait([future], timeout).not_done:
                self._error = "squeue takes long"
                return
            self._pending = None
            try:
                jobs, self._query_seconds = future.result()
                self._answer = began, jobs
            except LauncherUnavailable as error:
                self._error = str(error)

    def _timed_query(self) -> tuple[list[SlurmJob], float]:
        began = self._monotonic()
        return self._query(), self._monotonic() - began
