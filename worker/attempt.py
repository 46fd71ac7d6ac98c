"""The attempt this process belongs to: which one, whether it may run, and where what it prints goes."""

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.messages import Outcome
from trainyard.contract.parsing import parse_spec
from trainyard.contract.rundir import (
    AttemptDir,
    RunDir,
    fsync_directory,
    write_atomically,
)
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import TrainingError

LOCK_SECONDS = 10.0


class InvalidSpec(Exception):
    """The spec cannot be run; the message lists every mistake in it."""


@dataclass(frozen=True)
class AttemptContext:
    """One attempt, and the locks this process holds for as long as it lives."""

    run: RunDir
    directory: AttemptDir
    locks: tuple[FileLock, ...]


def read_spec(run: RunDir, number: int | None) -> JobSpec:
    """The spec of attempt ``number``, as the service resolved it; by hand, RUN_DIR/spec.json. Raises SpecUnusable."""
    file = run.spec if number is None else run.attempt(number).spec
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidSpec(f"{file} cannot be read: {error.strerror}") from error
    return _started_by_hand(file, content) if number is None else _resolved(file, content)


def _resolved(file: Path, content: bytes) -> JobSpec:
    try:
        return JobSpec.model_validate_json(content)
    except ValidationError as error:
        raise InvalidSpec(f"{file}: {error}") from error


def _started_by_hand(file: Path, content: bytes) -> JobSpec:
    import json

    try:
        parsed = parse_spec(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise InvalidSpec(f"{file} is not JSON: {error}") from error
    if parsed.problems:
        lines = [f"  {problem.pointer or '/'}  {problem.message}" for problem in parsed.problems]
        raise InvalidSpec("\n".join([f"{file} has {len(lines)} mistakes:", *lines]))
    return parsed.spec


def acquire(
    run: RunDir, number: int | None, ranks: DistributedContext, spec: JobSpec, from_step: int | None = None
) -> AttemptContext:
    """Hold the liveness lock, then make sure that this attempt is the one that may run. Raises Failure otherwise.

    The order matters: whoever starts another attempt takes the lock alone before writing ``current``, so either it
    finds our lock held, or we find its number. By hand there is no agent, and rank 0 does the agent's part: it also
    leaves ``from_step`` where the service leaves it.
    """
    held: list[FileLock] = []
    if number is None:
        number = ranks.broadcast_from_rank0(lambda: _begin(run, spec, from_step, held))
    alive = FileLock(run.alive_lock).take(shared=True, seconds=LOCK_SECONDS)
    current = _current(run)
    if current is not None and current != number:
        message = f"attempt {number} of {run.path} is not the current one, which is {current}"
        raise TrainingError(Reason.LAUNCH_FAILED, message, rank=ranks.rank)
    return AttemptContext(run, run.attempt(number), (*held, alive))


def _begin(run: RunDir, spec: JobSpec, from_step: int | None, held: list[FileLock]) -> int:
    try:
        held.append(FileLock(run.launch_lock).take())
        # Only looked at: each rank takes its own shared hold on it in a moment.
        FileLock(run.alive_lock).take(seconds=LOCK_SECONDS).release()
    except LockBusy as busy:
        message = f"another attempt of this run is alive: {busy}"
        raise TrainingError(Reason.LAUNCH_FAILED, message, "Stop it first, or wait for its end.") from busy
    number = max((attempt.number for attempt in run.attempts()), default=0) + 1
    directory = run.attempt(number)
    directory.path.mkdir()
    if from_step is not None:
        write_atomically(directory.resume_from, f"{from_step}\n".encode())
    write_spec(directory, spec)
    run.current.write_text(str(number))
    return number


def write_spec(directory: AttemptDir, spec: JobSpec) -> None:
    """Keep the spec this attempt runs."""
    write_atomically(directory.spec, spec.model_dump_json(indent=1).encode() + b"\n")


def _current(run: RunDir) -> int | None:
    try:
        return int(run.current.read_text())
    except (FileNotFoundError, ValueError):
        return None


STEP_DIGITS = 20

"""Fixed, so that a shorter number never leaves digits of a longer one behind."""


class Heartbeat:
    """Knows the step this rank is at; rank 0 also writes it to ``progress``."""

    def __init__(self, path: Path | None) -> None:
        self.step = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644) if path is not None else None

    def beat(self, step: int) -> None:
        """``step`` is done."""
        self.step = step
        if self._descriptor is not None:
            # A full disk must not end a run for want of a sign of life.
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, f"{step:<{STEP_DIGITS}}\n".encode(), 0)


def write_outcome_once(path: Path, outcome: Outcome) -> Outcome:
    """Publish ``outcome`` whole, unless there is one already; the one that stands is returned.

    A rank that is out of memory writes it while rank 0 still waits for that rank's gradient, and must not be
    overruled by rank 0's broken connection.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(outcome.model_dump_json(indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return Outcome.model_validate_json(path.read_bytes())
    finally:
        os.unlink(temporary)
    fsync_directory(path.parent)
    return outcome
