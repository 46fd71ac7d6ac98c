"""The training process of one rank, from its spec to its exit code."""

import os
import sys
from typing import NoReturn

from trainyard.contract.events import Event, Finished, WarningEvent
from trainyard.contract.failpoints import hit
from trainyard.contract.messages import Outcome
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Phase, Reason
from trainyard.worker.attempt import (
    AttemptContext,
    StepHeartbeat,
    UnusableSpec,
    acquire,
    read_spec,
    spec_changes,
    write_outcome_once,
)
from trainyard.worker.distributed import DistributedContext, init_distributed, shutdown_distributed
from trainyard.worker.errors import StopRequested, TrainingError, compile_error, out_of_memory_error
from trainyard.worker.events.console import ConsoleLogger
from trainyard.worker.events.phases import PhaseReporter
from trainyard.worker.events.trackers import Trackers
from trainyard.worker.events.writer import AnyEventWriter, EventWriter, NullEventWriter
from trainyard.worker.stop_signal import StopSignal
from trainyard.worker.train import EventSink, train
from trainyard.worker.training.metrics import peak_memory_bytes

FAILED, USAGE = 1, 2


def run_rank(run: RunDir, number: int | None, from_step: int | None = None) -> None:
    """Run one rank of attempt ``number``, or of a new one if it is None: started by hand. Raises SystemExit on failure.

    ``from_step``: if started by hand, the checkpoint to go back to.
    """
    try:
        spec = read_spec(run, number)
    except UnusableSpec as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        sys.exit(USAGE)
    if spec.training.is_deterministic:
        # cuBLAS reads it when it first uses the device.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        ranks = init_distributed(spec.resources.timeouts, spec.resources.device)
        attempt = acquire(run, number, ranks, spec, from_step)
    except TrainingError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(FAILED)
    outcome = _run(spec, attempt, ranks, by_hand=number is None)
    if outcome.outcome == "failed":
        if ranks.is_main_process or (outcome.error is not None and outcome.error.rank == ranks.rank):
            hint = f"\n  {outcome.error.hint}" if outcome.error is not None and outcome.error.hint else ""
            print(f"failed at step {outcome.step}: {outcome.message}{hint}", file=sys.stderr, flush=True)
        # The other ranks may be anywhere by now: do not wait for them.
        _exit_failed(ranks)
    shutdown_distributed(ranks)


def _exit_failed(ranks: DistributedContext) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if ranks.control is not None:
        # At an orderly exit, the destructor of a NCCL communicator may wait for ranks that are gone. All is on disk.
        os._exit(FAILED)
    sys.exit(FAILED)


def _run(spec: JobSpec, attempt: AttemptContext, ranks: DistributedContext, *, by_hand: bool) -> Outcome:
    """Train, then write the outcome: first outcome.json, then the last event."""
    directory, console = attempt.directory, ConsoleLogger()
    outbox: AnyEventWriter = EventWriter(directory.outbox) if ranks.is_main_process else NullEventWriter()

    def emit(event: Event) -> None:
        if ranks.is_main_process:
            outbox.emit(event)
            console.log_event(event)

    if by_hand and ranks.is_main_process and (changes := spec_changes(attempt, spec)):
        # The service checks a changed spec, and shows it; by hand it would take effect unnoticed.
        message = f"spec.json has changed since the attempt before this one: {'; '.join(changes)}"
        emit(WarningEvent(code="spec_changed", message=message))
    heartbeat = StepHeartbeat(directory.progress if ranks.is_main_process else None)
    outcome = _run_training(spec, attempt, ranks, heartbeat, emit)
    if ranks.is_main_process or outcome.outcome == "failed":
        outcome = write_outcome_once(directory.outcome, outcome)
    seconds = heartbeat.train_seconds() if heartbeat.train_seconds is not None else None
    emit(
        Finished(
            outcome=outcome.outcome,
            step=outcome.step,
            reason=outcome.reason,
            message=outcome.message,
            train_seconds=seconds,
        )
    )
    outbox.close()
    return outcome


def _run_training(
    spec: JobSpec, attempt: AttemptContext, ranks: DistributedContext, heartbeat: StepHeartbeat, emit: EventSink
) -> Outcome:
    """Train and return the outcome. An unforeseen exception is raised: it is a bug, and needs its traceback."""
    stop = StopSignal.install_handlers(attempt.directory.stop if ranks.is_main_process else None)
    phases = PhaseReporter(emit)
    trackers = Trackers(spec if ranks.is_main_process else None, attempt.run.path, emit)
    try:
        return train(spec, attempt, ranks, heartbeat, stop, trackers, phases, emit)
    except StopRequested:
        message = "stopped before the first step; there was nothing to save"
        return Outcome(outcome="stopped", step=heartbeat.step, reason=Reason.USER, message=message)
    except TrainingError as error:
        return error.outcome(heartbeat.step)
    except (RuntimeError, MemoryError) as error:
        not_compiled = compile_error(error)
        if not_compiled is not None and stop.requested():
            # The signal that requested the stop has also ended the compiler. Every step so far was saved before this
            # attempt began.
            return Outcome(
                outcome="stopped", step=heartbeat.step, reason=Reason.USER, message="stopped while compiling"
            )
        known = not_compiled or out_of_memory_error(
            error,
            rank=ranks.rank,
            step=heartbeat.step,
            training=spec.training,
            resources=spec.resources,
            peak_bytes=peak_memory_bytes(ranks.device),
        )
        if known is None:
            raise
        return known.outcome(heartbeat.step)
    finally:
        phases.enter(Phase.SAVING)
        hit("trackers.close")
        trackers.close()
