"""The attempt of this process: its spec, the lock that lets it run, its heartbeat and its outcome."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.messages import Outcome
from trainyard.contract.parsing import parse_spec
from trainyard.contract.rundir import AttemptDir, RunDir, fsync_directory, temporary_file, write_atomically
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.errors import TrainingError

if TYPE_CHECKING:
    # The process that prepares a corpus has no ranks, and does not load torch.
    from trainyard.worker.distributed import DistributedContext

LOCK_SECONDS = 10.0
STEP_DIGITS, SECONDS_DIGITS = 20, 24
"""Fixed, so that a shorter number leaves no digits of a longer one."""


class UnusableSpec(Exception):
    """The spec cannot be run. The message lists every mistake in it."""


@dataclass(frozen=True)
class AttemptContext:
    """One attempt, and the locks that this process holds until it exits."""

    run: RunDir
    directory: AttemptDir
    locks: tuple[FileLock, ...]


def read_spec(run: RunDir, number: int | None) -> JobSpec:
    """Return the resolved spec of attempt ``number``, or RUN_DIR/spec.json if it is None. Raises UnusableSpec."""
    file = run.spec if number is None else run.attempt(number).spec
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UnusableSpec(f"{file} cannot be read: {error.strerror}") from error
    if number is not None:
        try:
            return JobSpec.model_validate_json(content)
        except ValidationError as error:
            raise UnusableSpec(f"{file}: {error}") from error
    try:
        parsed = parse_spec(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise UnusableSpec(f"{file} is not JSON: {error}") from error
    if parsed.problems:
        lines = [f"  {problem.pointer or '/'}  {problem.message}" for problem in parsed.problems]
        raise UnusableSpec("\n".join([f"{file} has {len(lines)} mistakes:", *lines]))
    return parsed.spec


def acquire(
    run: RunDir, number: int | None, ranks: "DistributedContext", spec: JobSpec, from_step: int | None = None
) -> AttemptContext:
    """Take the liveness lock and check that this attempt is the current one. Raises TrainingError otherwise.

    ``number`` None: started by hand, without an agent. Then rank 0 creates the attempt, with ``from_step`` in it.
    """
    locks: list[FileLock] = []
    if number is None:
        number = ranks.broadcast_from_rank0(lambda: _create_attempt(run, spec, from_step, locks))
    return AttemptContext(run, run.attempt(number), (*locks, take_alive_lock(run, number, ranks.rank)))


def take_alive_lock(run: RunDir, number: int, rank: int = 0) -> FileLock:
    """Take the liveness lock. Raises TrainingError if attempt ``number`` is not the current one."""
    # The order matters. Another attempt takes this lock exclusively before it writes ``current``: either it finds our
    # lock taken, or we find its number.
    alive = FileLock(run.alive_lock).take(shared=True, seconds=LOCK_SECONDS)
    try:
        current: int | None = int(run.current.read_text())
    except (FileNotFoundError, ValueError):
        current = None
    if current is not None and current != number:
        message = f"attempt {number} of {run.path} is not the current one, which is {current}"
        raise TrainingError(Reason.LAUNCH_FAILED, message, rank=rank)
    return alive


def _create_attempt(run: RunDir, spec: JobSpec, from_step: int | None, locks: list[FileLock]) -> int:
    try:
        locks.append(FileLock(run.launch_lock).take())
        # Only a check that it is free: each rank takes its own shared lock after this.
        FileLock(run.alive_lock).take(seconds=LOCK_SECONDS).release()
    except LockBusy as busy:
        message = f"another attempt of this run is alive: {busy}"
        raise TrainingError(Reason.LAUNCH_FAILED, message, "Stop it first, or wait for its end.") from busy
    number = max((attempt.number for attempt in run.attempts()), default=0) + 1
    directory = run.attempt(number)
    directory.path.mkdir()
    if from_step is not None:
        write_atomically(directory.resume_from, f"{from_step}\n".encode())
    write_atomically(directory.spec, spec.model_dump_json(indent=1).encode() + b"\n")
    run.current.write_text(str(number))
    return number


def evaluated_loss(run: RunDir, step: int) -> float | None:
    """Return the ``eval_loss`` of the metric line of ``step``, or None if no attempt has emitted one."""
    losses = (line.get("eval_loss") for line in _lines_of_step(run, step, "metric"))
    return next((float(loss) for loss in losses if loss is not None), None)


def scored_tasks(run: RunDir, step: int) -> frozenset[str]:
    """Return the names of the tasks that an attempt of this run has scored at ``step``."""
    return frozenset(line["task"] for line in _lines_of_step(run, step, "task"))


def _lines_of_step(run: RunDir, step: int, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the events of ``kind`` at ``step``, the newest first.

    If an attempt resumed from an earlier step, the events of the attempts before it are left out: at ``step`` they had
    other weights.
    """
    for attempt in reversed(list(run.attempts())):
        found: list[dict[str, Any]] = []
        with contextlib.suppress(OSError), attempt.outbox.open("rb") as lines:
            for line in lines:
                if f'"step":{step},'.encode() in line and f'"kind":"{kind}"'.encode() in line:
                    with contextlib.suppress(ValueError):
                        found.append(json.loads(line))
        yield from reversed(found)
        from_step = attempt.read_resume_from()
        if from_step is not None and from_step < step:
            return


def spec_changes(attempt: AttemptContext, spec: JobSpec) -> list[str]:
    """Return how ``spec`` differs from that of the attempt before this one, such as "training.epochs is 3 and was 2".

    [] if this is the first attempt, or if the older spec cannot be read.
    """
    older = [other for other in attempt.run.attempts() if other.number < attempt.directory.number]
    try:
        before = read_spec(attempt.run, max(other.number for other in older)) if older else spec
    except UnusableSpec:
        return []
    old, new = (_flatten(each.model_dump(mode="json")) for each in (before, spec))
    return [
        f"{name} is {new.get(name)} and was {old.get(name)}" for name in new | old if new.get(name) != old.get(name)
    ]


def _flatten(group: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in group.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class StepHeartbeat:
    """The last step of this rank. Rank 0 also writes it to the attempt's progress file, for the hang detector.

    ``train_seconds`` returns the active training time of all attempts, which is written too: see
    `contract.rundir.RunDir.train_seconds`. It is None until the run is loaded.
    """

    def __init__(self, path: Path | None) -> None:
        self.step = 0
        self.train_seconds: Callable[[], float] | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644) if path is not None else None

    def beat(self, step: int) -> None:
        """Record that ``step`` is done."""
        self.step = step
        if self._descriptor is not None:
            # A full disk must not end a run.
            with contextlib.suppress(OSError):
                seconds = f"{self.train_seconds():<{SECONDS_DIGITS}.6f}\n" if self.train_seconds is not None else ""
                # In one call, so that a kill leaves both numbers or neither.
                os.pwrite(self._descriptor, f"{step:<{STEP_DIGITS}}\n{seconds}".encode(), 0)


def write_outcome_once(path: Path, outcome: Outcome) -> Outcome:
    """Write ``outcome`` atomically, unless there is one already. Return the one that is on disk."""
    # The first one is the cause: a rank that is out of memory writes it while rank 0 still waits for its gradient, and
    # rank 0's broken connection must not replace it.
    temporary = temporary_file(path)
    try:
        with temporary.open("wb") as file:
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
