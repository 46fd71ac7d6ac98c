"""The training process of one rank, from its command line to its exit code."""

import os
import sys

from trainyard.contract.events import Event, Finished
from trainyard.contract.messages import Outcome
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.attempt import (
    Attempt,
    SignOfLife,
    SpecUnusable,
    claim,
    publish_outcome,
    read_spec,
)
from trainyard.worker.distributed import Ranks, join, leave
from trainyard.worker.errors import (
    Failure,
    StopAsked,
    cannot_compile,
    out_of_memory,
)
from trainyard.worker.events.console import Console
from trainyard.worker.events.trackers import Trackers
from trainyard.worker.events.writer import AnyOutbox, Outbox, Silent
from trainyard.worker.train import Say, train
from trainyard.worker.training.control import StopWish
from trainyard.worker.training.metrics import memory_bytes

FAILED, USAGE = 1, 2


def run_rank(run: RunDir, number: int | None, from_step: int | None = None) -> None:
    """Run one rank of attempt ``number``; None: started by hand. Ends with SystemExit unless all went well.

    ``from_step``: by hand, the checkpoint to go back to.
    """
    try:
        spec = read_spec(run, number)
    except SpecUnusable as unusable:
        if os.environ.get("RANK", "0") == "0":
            print(unusable, file=sys.stderr, flush=True)
        sys.exit(USAGE)
    _configure(spec)
    ranks = join(spec.resources.timeouts, spec.resources.device)
    try:
        attempt = claim(run, number, ranks, spec, from_step)
    except Failure as failure:
        print(failure, file=sys.stderr, flush=True)
        sys.exit(FAILED)
    outcome = _run(spec, attempt, ranks)
    if outcome.outcome == "failed":
        # Ranks may be anywhere: nobody waits for anybody any more.
        sys.exit(FAILED)
    leave(ranks)


def _configure(spec: JobSpec) -> None:
    """Settings that libraries read when they first touch the device."""
    if spec.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _run(spec: JobSpec, attempt: Attempt, ranks: Ranks) -> Outcome:
    """Train, and leave the outcome where everybody looks for it: first outcome.json, then the last event."""
    directory, console = attempt.directory, Console()
    outbox: AnyOutbox = Outbox(directory.outbox) if ranks.leads else Silent()

    def say(event: Event) -> None:
        if ranks.leads:
            outbox.say(event)
            console.show(event)

    life = SignOfLife(directory.progress if ranks.leads else None)
    outcome = _trained(spec, attempt, ranks, life, say)
    if ranks.leads or outcome.outcome == "failed":
        outcome = publish_outcome(directory.outcome, outcome)
    say(Finished(outcome=outcome.outcome, step=outcome.step, reason=outcome.reason, message=outcome.message))
    outbox.close()
    return outcome


def _trained(spec: JobSpec, attempt: Attempt, ranks: Ranks, life: SignOfLife, say: Say) -> Outcome:
    """The outcome of every end that was foreseen. What was not is raised: it is a bug, and its traceback is needed."""
    stop = StopWish.heard_by_signal(attempt.directory.stop if ranks.leads else None)
    trackers = Trackers(spec if ranks.leads else None, attempt.run.path, say)
    try:
        return train(spec, attempt, ranks, life, stop, trackers, say)
    except StopAsked:
        message = "stopped before the first step; there was nothing to save"
        return Outcome(outcome="stopped", step=life.step, reason=Reason.USER, message=message)
    except Failure as failure:
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
