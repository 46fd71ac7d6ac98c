"""The training process of one rank, from its command line to its exit code."""

import os
import sys

from trainyard.contract.events import Event, Finished
from trainyard.contract.messages import Outcome
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.attempt import (
    AttemptContext,
    Heartbeat,
    InvalidSpec,
    acquire,
    read_spec,
    write_outcome_once,
)
from trainyard.worker.distributed import DistributedContext, init_distributed, shutdown_distributed
from trainyard.worker.errors import (
    StopRequested,
    TrainingError,
    cannot_compile,
    out_of_memory,
)
from trainyard.worker.events.console import ConsoleLogger
from trainyard.worker.events.trackers import Trackers
from trainyard.worker.events.writer import AnyEventWriter, EventWriter, NullEventWriter
from trainyard.worker.train import EventSink, train
from trainyard.worker.training.control import StopSignal
from trainyard.worker.training.metrics import memory_bytes

FAILED, USAGE = 1, 2


def run_rank(run: RunDir, number: int | None, from_step: int | None = None) -> None:
    """Run one rank of attempt ``number``; None: started by hand. Ends with SystemExit unless all went well.

    ``from_step``: by hand, the checkpoint to go back to.
    """
    try:
        spec = read_spec(run, number)
    except InvalidSpec as unusable:
        if os.environ.get("RANK", "0") == "0":
            print(unusable, file=sys.stderr, flush=True)
        sys.exit(USAGE)
    _configure(spec)
    ranks = init_distributed(spec.resources.timeouts, spec.resources.device)
    try:
        attempt = acquire(run, number, ranks, spec, from_step)
    except TrainingError as failure:
        print(failure, file=sys.stderr, flush=True)
        sys.exit(FAILED)
    outcome = _run(spec, attempt, ranks)
    if outcome.outcome == "failed":
        # Ranks may be anywhere: nobody waits for anybody any more.
        sys.exit(FAILED)
    shutdown_distributed(ranks)


def _configure(spec: JobSpec) -> None:
    """Settings that libraries read when they first touch the device."""
    if spec.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _run(spec: JobSpec, attempt: AttemptContext, ranks: DistributedContext) -> Outcome:
    """Train, and leave the outcome where everybody looks for it: first outcome.json, then the last event."""
    directory, console = attempt.directory, ConsoleLogger()
    outbox: AnyEventWriter = EventWriter(directory.outbox) if ranks.is_main_process else NullEventWriter()

    def say(event: Event) -> None:
        if ranks.is_main_process:
            outbox.emit(event)
            console.log_event(event)

    life = Heartbeat(directory.progress if ranks.is_main_process else None)
    outcome = _run_training(spec, attempt, ranks, life, say)
    if ranks.is_main_process or outcome.outcome == "failed":
        outcome = write_outcome_once(directory.outcome, outcome)
    say(Finished(outcome=outcome.outcome, step=outcome.step, reason=outcome.reason, message=outcome.message))
    outbox.close()
    return outcome


def _run_training(
    spec: JobSpec, attempt: AttemptContext, ranks: DistributedContext, life: Heartbeat, say: EventSink
) -> Outcome:
    """The outcome of every end that was foreseen. What was not is raised: it is a bug, and its traceback is needed."""
    stop = StopSignal.install_handlers(attempt.directory.stop if ranks.is_main_process else None)
    trackers = Trackers(spec if ranks.is_main_process else None, attempt.run.path, say)
    try:
        return train(spec, attempt, ranks, life, stop, trackers, say)
    except StopRequested:
        message = "stopped before the first step; there was nothing to save"
        return Outcome(outcome="stopped", step=life.step, reason=Reason.USER, message=message)
    except TrainingError as failure:
        return failure.outcome(life.step)
    except (RuntimeError, MemoryError) as error:
        failure_or_none = cannot_compile(error) or out_of_memory(
            error,
            rank=ranks.rank,
            step=life.step,
            training=spec.training,
            peak_bytes=memory_bytes(ranks.device),
        )
        if failure_or_none is None:
            raise
        return failure_or_none.outcome(life.step)
    finally:
        trackers.close()
