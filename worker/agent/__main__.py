"""`python -m trainyard.worker.agent RUN_DIR --attempt N`: the small, torch-free parent of one attempt's processes on one node.

On several nodes there is one on each, see `worker.agent.rendezvous`; what is written here is of the first.

It outlives the service that started it. It never ends a run because it cannot reach somebody: it stops one only when
the service says so, when it is told by a signal, or when the ranks are beyond doubt dead or stuck.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import UNSEEN, AttemptDir, RunDir
from trainyard.worker.agent.follower import run_follower
from trainyard.worker.agent.processes import ProcessTree, become_subreaper
from trainyard.worker.agent.rendezvous import (
    NodeInfo,
    can_reach,
    node_name,
    publish_endpoint,
)
from trainyard.worker.agent.torchrun import launch_torchrun, write_started
from trainyard.worker.output import redirect_output

TICK_SECONDS = 0.05
LAUNCH_LOCK_SECONDS = 10.0
HOME_SECONDS = 10.0
ORPHAN_SECONDS = 10.0

EXIT_REFUSED = 75
"""sysexits.h EX_TEMPFAIL: nothing was started, because something else of this job still lives."""


def main(arguments: list[str] | None = None) -> int:
    """Run one attempt to its end and report it; the exit code says whether anything was started."""
    run, attempt = _parse(arguments)
    place = NodeInfo.of(os.environ)
    become_subreaper()
    if place.clustered and not can_reach(attempt, HOME_SECONDS):
        print(f"{UNSEEN}: {attempt.path} is not there on {node_name()}", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    attempt.logs.mkdir(parents=True, exist_ok=True)
    if place.clustered:
        # The cluster's own log would mix the lines of several nodes.
        redirect_output(attempt.node_log(place.node))
    if not place.is_leader:
        return run_follower(run, attempt, place)
    if place.clustered and attempt.started.exists():
        # A cluster may start again what it had started. What was reported of it then stays true.
        print("agent: nothing was started: this attempt was started before", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    try:
        launch_lock = FileLock(run.launch_lock).take(seconds=LAUNCH_LOCK_SECONDS)
        alive_lock = FileLock(run.alive_lock).take(seconds=ORPHAN_SECONDS)
        _require_current(run, attempt)
        children = _start(run, attempt, alive_lock, place)
    except (LockBusy, AttemptSuperseded, OSError, ValueError, KeyError) as why:
        return _report_refusal(attempt, why)
    # Imported only now: torchrun needs seconds to start, and pydantic's import hides behind them.
    from trainyard.worker.agent.supervisor import Supervisor

    try:
        supervisor = Supervisor.of(attempt, children, place)
    except Exception as error:
        # Whatever it is: ranks that nobody watches must not go on.
        children.kill()
        return _report_refusal(attempt, error)
    for signum in (signal.SIGTERM, signal.SIGINT, *((signal.SIGURG,) if place.clustered else ())):
        signal.signal(signum, supervisor.on_signal)
    while supervisor.is_running(time.monotonic()):
        time.sleep(TICK_SECONDS)
    alive_lock.release()
    supervisor.write_report()
    # Free before the report is delivered: the next attempt must not wait for a service that is away.
    launch_lock.release()
    supervisor.deliver()
    return 0


def _parse(arguments: list[str] | None) -> tuple[RunDir, AttemptDir]:
    parser = argparse.ArgumentParser(prog="python -m trainyard.worker.agent", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--attempt", type=int, required=True)
    parsed = parser.parse_args(arguments)
    run = RunDir(parsed.run_dir.resolve())
    return run, run.attempt(parsed.attempt)


class AttemptSuperseded(Exception):
    """The attempt was given up, or another one followed it, before this agent came to start it."""


def _require_current(run: RunDir, attempt: AttemptDir) -> None:
    """Raise NotWanted where this agent comes too late: its service was stopped between the decision and the launch.

    Asked while the launch lock is held, so that nobody else starts an attempt of this job meanwhile.
    """
    if attempt.closed.exists():
        raise AttemptSuperseded("the attempt was given up before its agent started")
    try:
        current = int(run.current.read_text())
    except (FileNotFoundError, ValueError):
        return
    if current > attempt.number:
        raise AttemptSuperseded(f"attempt {current} was started before attempt {attempt.number} was")


def _start(run: RunDir, attempt: AttemptDir, alive_lock: FileLock, place: NodeInfo) -> ProcessTree:
    """Everything that must be true before the first rank exists.

    ``current`` is written while the alive lock is ours alone, so a rank of an earlier attempt that was still on its way
    either holds the lock, and we did not get here, or will read that it is not wanted any more and end.
    """
    run.current.write_text(str(attempt.number))
    alive_lock.take(shared=True)
    write_started(attempt)
    torchrun = launch_torchrun(run, attempt, alive_lock, place, publish_endpoint(attempt, place))
    return ProcessTree(torchrun, ancestor=os.getpid())


def _report_refusal(attempt: AttemptDir, why: Exception) -> int:
    from trainyard.worker.agent.exit_report import launch_failed_report

    message = str(why) if isinstance(why, LockBusy | AttemptSuperseded) else f"{type(why).__name__}: {why}"
    print(f"agent: nothing was started: {message}", file=sys.stderr, flush=True)
    if not isinstance(why, LockBusy | AttemptSuperseded):
        traceback.print_exception(why)
    if not attempt.exit.exists():
        launch_failed_report(attempt, message)
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
