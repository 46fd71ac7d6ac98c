"""Slurm's own commands, each with a time-out: what does not answer in time says nothing at all."""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from service.launch.base import LaunchRefused, NoAnswer
from service.launch.squeue import SlurmJob, jobs_in

SUBMIT_SECONDS = 10.0
CANCEL_SECONDS = 10.0
LOOK_SECONDS = 10.0
PATIENCE_SECONDS = 2.0
"""Whoever asks for the queue waits so long for the answer; the question goes on being asked beside."""

FRESH_SECONDS = 1.0

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
)
"""What Slurm's commands say where it is unknown whether the controller has done what they asked."""


def slurm_environment() -> dict[str, str]:
    """Where Slurm is configured, if not where its commands look by themselves."""
    return {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}


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
        raise NoAnswer(f"{command[0]} did not answer within {seconds:g} s") from late
    except OSError as error:
        raise LaunchRefused(f"{command[0]} cannot be run: {error.strerror}") from error
    said = " ".join(done.stderr.split())
    if done.returncode == 0:
        return done.stdout
    if any(words in said.lower() for words in UNREACHABLE):
        raise NoAnswer(f"{command[0]}: {said}")
    raise LaunchRefused(said or f"{command[0]} ended with {done.returncode}")


def submit(script: Path, environment: Mapping[str, str]) -> str:
    """Hand the script over; returns Slurm's number of it. ``environment`` is the job's. Raises as `run`."""
    said = run(["sbatch", "--parsable", str(script)], SUBMIT_SECONDS, environment)
    return said.strip().partition(";")[0]


def cancel(job: SlurmJob, *options: str) -> None:
    """``scancel`` with ``options``. A job that has ended in between is as good. Raises NoAnswer."""
    try:
        run(["scancel", *options, job.id], CANCEL_SECONDS)
    except LaunchRefused as said:
        if "already" not in str(said).lower() and "invalid job id" not in str(said).lower():
            raise NoAnswer(str(said)) from said


def installed() -> bool:
    """Whether Slurm's commands are here."""
    return all(shutil.which(name) for name in ("sbatch", "squeue", "scancel"))


Look = Callable[[], list[SlurmJob]]


def look(prefix: str) -> list[SlurmJob]:
    """Our jobs, those that ended a while ago among them. Raises NoAnswer."""
    try:
        return jobs_in(run(["squeue", "--json", "--states=all"], LOOK_SECONDS), prefix)
    except (LaunchRefused, ValueError) as trouble:
        raise NoAnswer(str(trouble)) from trouble


class Queue:
    """The newest answer of `look`, asked beside whoever wants it: a controller that is away blocks nobody for long."""

    def __init__(self, look: Look, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="squeue")
        self._asking: tuple[float, Future[list[SlurmJob]]] | None = None
        self._answer: tuple[float, list[SlurmJob]] | None = None

    def jobs(self, since: float | None = None) -> list[SlurmJob]:
        """The queue as it was a second ago at most, or was asked for after ``since``. Raises NoAnswer."""
        oldest = self._monotonic() - FRESH_SECONDS if since is None else since
        for _ in range(2):  # what is being asked already may have been asked too early
            if self._answer is not None and self._answer[0] > oldest:
                break
            self._ask()
        if self._answer is None or self._answer[0] <= oldest:
            raise NoAnswer("Slurm's controller does not answer")
        return self._answer[1]

    def _ask(self) -> None:
        with self._lock:
            if self._asking is None:
                self._asking = self._monotonic(), self._threads.submit(self._look)
            began, asked = self._asking
            patience = max(0.0, began + PATIENCE_SECONDS - self._monotonic())
            if wait([asked], patience).not_done:
                return
            self._asking = None
            with contextlib.suppress(NoAnswer):
                self._answer = began, asked.result()
