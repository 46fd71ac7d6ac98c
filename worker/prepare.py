"""`python -m trainyard.worker prepare RUN_DIR --attempt N`: prepare the corpus of a run in a process without devices.

An agent supervises it like ranks. A killed preparation is continued by the next one. Exit code 0: prepared, or stopped
on request; 1: failed. Does not load torch.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trainyard.contract.events import Event, Finished, PhaseChanged
from trainyard.contract.messages import Outcome, read_message
from trainyard.contract.prepared import PrepareTask
from trainyard.contract.rundir import AttemptDir, RunDir
from trainyard.contract.status import Phase, Reason
from trainyard.contract.stdio import ignore_output_errors
from trainyard.contract.units import counted
from trainyard.worker.attempt import UnusableSpec, read_spec, take_alive_lock, write_outcome_once
from trainyard.worker.data.prepare import prepare_corpus
from trainyard.worker.errors import StopRequested, TrainingError, save_error
from trainyard.worker.events.console import ConsoleLogger
from trainyard.worker.events.writer import EventWriter
from trainyard.worker.output import redirect_output
from trainyard.worker.paths import check_allowed_paths
from trainyard.worker.stop_signal import StopSignal

NICENESS = 10
"""Runs on the same host come first."""


def main(arguments: Sequence[str]) -> int:
    """Run one preparation. Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainyard.worker prepare", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--attempt", type=int, required=True, metavar="N")
    options = parser.parse_args(arguments)
    run = RunDir(options.run_dir.resolve())
    attempt = run.attempt(options.attempt)
    attempt.logs.mkdir(parents=True, exist_ok=True)
    redirect_output(attempt.rank_log(0))
    ignore_output_errors()
    os.nice(NICENESS)
    stop = StopSignal.install_handlers(attempt.stop)
    console = ConsoleLogger()
    try:
        alive = take_alive_lock(run, attempt.number)
    except TrainingError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    with alive, EventWriter(attempt.outbox) as outbox:

        def emit(event: Event) -> None:
            outbox.emit(event)
            console.log_event(event)

        emit(PhaseChanged(phase=Phase.PREPARING_DATA))
        outcome = write_outcome_once(attempt.outcome, _prepare(run, attempt, stop, emit))
        emit(Finished(outcome=outcome.outcome, step=0, reason=outcome.reason, message=outcome.message))
    return 1 if outcome.outcome == "failed" else 0


def _prepare(run: RunDir, attempt: AttemptDir, stop: StopSignal, emit: Callable[[Event], None]) -> Outcome:
    task = read_message(PrepareTask, attempt.prepare)
    try:
        spec = read_spec(run, attempt.number)
        if task is None:
            raise UnusableSpec(f"{attempt.prepare} cannot be read")
        check_allowed_paths(spec, run)
        data = prepare_corpus(spec, run, task, emit, stop.requested)
    except StopRequested:
        return Outcome(outcome="stopped", step=0, reason=Reason.USER, message="stopped; the finished part is kept")
    except UnusableSpec as error:
        return TrainingError(Reason.SPEC_INVALID, str(error)).outcome(0)
    except MemoryError as error:
        return save_error(error, "the corpus's token shards").outcome(0)
    except TrainingError as error:
        return error.outcome(0)
    message = f"prepared {counted(data.documents, 'document')} with {counted(data.tokens, 'token')}"
    return Outcome(outcome="completed", step=0, message=message)
