"""Slurm's own commands, each with a time-out: what does not answer in time says nothing at all."""

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
PATIENCE_SECONDS = 2.0
"""Whoever asks for the queue waits so long for the answer; the question goes on being asked beside."""

FRESH_SECONDS = 1.0
REST = 10.0
"""An answer is good for so many times as long as it took: a controller that has much to say is not asked all along."""

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
"""What Slurm's commands say where it is unknown whether the controller has done what they asked, or where they could
not even ask: that is this host's trouble and no word on the job."""

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
"""Part of what sbatch says where it refuses -> what to do."""


def slurm_environment() -> dict[str, str]:
    """Where Slurm is configured and its libraries are, if not where its commands look by themselves."""
    names = ("SLURM_CONF", "LD_LIBRARY_PATH", "HOME")
    return {name: os.environ[name] for name in names if name in os.environ}


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> str:
    """What ``command`` prints. Raises NoAnswer, or LaunchRefused with what Slurm says."""
    try:
        done = subprocess.run(
            command,
            env={"PATH": os.environ.get("PATH", ""), **slurm_environment(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as late:
        raise LauncherUnavailable(
            f"{command[0]} did not answer within {seconds:g} s{_last_line(late.stderr)}"
        ) from late
    except OSError as error:
        raise _refusal(f"{command[0]} cannot be run: {error.strerror}") from error
    said = " ".join(done.stderr.split())
    if done.returncode == 0:
        return done.stdout
    if any(words in said.lower() for words in UNREACHABLE):
        raise LauncherUnavailable(f"{command[0]}: {said}")
    raise _refusal(said or f"{command[0]} ended with {done.returncode}")


def _last_line(said: bytes | str | None) -> str:
    """What a command complained of while it went on trying: a login node without munge says so only there."""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said or ""
    lines = text.strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""


def _refusal(said: str) -> LaunchRefused:
    return LaunchRefused(said, next((hint for part, hint in HINTS if part in said.lower()), None))


@failpoint("launch.slurm.submit")
def submit(script: Path, environment: Mapping[str, str]) -> str | None:
    """Hand the script over; returns Slurm's number of it. ``environment`` is the job's. Raises as `run`.

    None where it was taken and no number can be found in what was said: some clusters add words of their own.
    """
    said = run(["sbatch", "--parsable", str(script)], SUBMIT_SECONDS, environment)
    numbers = re.findall(r"^(\d+)(?:;\S*)?$", said, re.MULTILINE)
    return numbers[-1] if numbers else None


def cluster_name() -> str:
    """The name of the cluster that these commands speak to. Raises NoAnswer."""
    try:
        said = run(["scontrol", "show", "config"], NAME_SECONDS)
    except LaunchRefused as trouble:
        raise LauncherUnavailable(str(trouble)) from trouble
    found = re.search(r"^ClusterName\s*=\s*(\S+)", said, re.MULTILINE)
    if found is None:
        raise LauncherUnavailable("scontrol names no cluster")
    return found.group(1)


def cancel(job: SlurmJob, *options: str) -> None:
    """``scancel`` with ``options``. A job that has ended in between is as good. Raises NoAnswer."""
    try:
        run(["scancel", *options, job.id], CANCEL_SECONDS)
    except LaunchRefused as said:
        if "already" not in str(said).lower() and "invalid job id" not in str(said).lower():
            raise LauncherUnavailable(str(said)) from said


QueueQuery = Callable[[], list[SlurmJob]]


def query_queue(prefix: str) -> list[SlurmJob]:
    """Our jobs, those that ended a while ago among them. Raises NoAnswer."""
    try:
        return parse_squeue(run(["squeue", "--json", "--me", "--states=all"], QUERY_SECONDS), prefix)
    except (LaunchRefused, ValueError) as trouble:
        raise LauncherUnavailable(str(trouble)) from trouble


class QueueCache:
    """The newest answer of `look`, asked beside whoever wants it: a controller that is away blocks nobody for long."""

    def __init__(self, look: QueueQuery, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="squeue")
        self._asking: tuple[float, Future[tuple[list[SlurmJob], float]]] | None = None
        self._answer: tuple[float, list[SlurmJob]] | None = None
        self._took = 0.0
        self._trouble = "it was not asked yet"

    @property
    def fresh_seconds(self) -> float:
        """So long an answer is good enough for whoever has changed nothing since."""
        return max(FRESH_SECONDS, REST * self._took)

    def jobs(self, since: float | None = None) -> list[SlurmJob]:
        """The queue as it was `fresh_seconds` ago at most, or was asked for after ``since``. Raises NoAnswer."""
        oldest = self._monotonic() - self.fresh_seconds if since is None else since
        for _ in range(2):  # what is being asked already may have been asked too early
            if self._answer is not None and self._answer[0] > oldest:
                break
            self._ask()
        if self._answer is None or self._answer[0] <= oldest:
            raise LauncherUnavailable(f"Slurm does not answer: {self._trouble}")
        return self._answer[1]

    def _ask(self) -> None:
        with self._lock:
            if self._asking is None:
                self._asking = self._monotonic(), self._threads.submit(self._timed)
            began, asked = self._asking
            patience = max(0.0, began + PATIENCE_SECONDS - self._monotonic())
            if wait([asked], patience).not_done:
                self._trouble = "squeue takes long"
                return
            self._asking = None
            try:
                jobs, self._took = asked.result()
                self._answer = began, jobs
            except LauncherUnavailable as trouble:
                self._trouble = str(trouble)

    def _timed(self) -> tuple[list[SlurmJob], float]:
        began = self._monotonic()
        return self._look(), self._monotonic() - began
