"""`python -m trainyard.worker.agent RUN_DIR --attempt N`: the torch-free parent of an attempt's processes on one node.

An attempt that prepares a corpus has one process and no ranks.

A run on several nodes has one agent on each, see `worker.agent.rendezvous`; this file is the first node's.

An agent outlives the service that started it, and never ends a run because the service cannot be reached. It stops a
run only at the service's request, on a signal, or if the ranks are certainly dead or hung.
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
from trainyard.contract.stdio import ignore_output_errors
from trainyard.worker.agent.follower import run_follower
from trainyard.worker.agent.rendezvous import NodeInfo, can_reach, node_name, publish_endpoint
from trainyard.worker.agent.torchrun import (
    ProcessTree,
    become_subreaper,
    launch_preparation,
    launch_torchrun,
    write_started,
)
from trainyard.worker.output import redirect_output

TICK_SECONDS = 0.05
LAUNCH_LOCK_SECONDS = 10.0
HOME_SECONDS = 10.0
ORPHAN_SECONDS = 10.0

EXIT_NOT_STARTED = 75
"""sysexits.h EX_TEMPFAIL: nothing was started, because a process of this job is still alive, or for another reason."""


def main(arguments: list[str] | None = None) -> int:
    """Run one attempt to its end and report it. Return 0, or EXIT_NOT_STARTED if nothing was started."""
    run, attempt = _parse(arguments)
    node = NodeInfo.of(os.environ)
    become_subreaper()
    ignore_output_errors()
    if node.clustered and not can_reach(attempt, HOME_SECONDS):
        print(f"{UNSEEN}: {attempt.path} is not there on {node_name()}", file=sys.stderr, flush=True)
        return EXIT_NOT_STARTED
    attempt.logs.mkdir(parents=True, exist_ok=True)
    if node.clustered:
        # The cluster's own log would mix the lines of several nodes.
        redirect_output(attempt.node_log(node.node))
    if not node.is_leader:
        return run_follower(run, attempt, node)
    if node.clustered and attempt.started.exists():
        # A cluster may requeue and start an attempt a second time. The report of the first time stays valid.
        print("agent: nothing was started: this attempt was started before", file=sys.stderr, flush=True)
        return EXIT_NOT_STARTED
    try:
        launch_lock = FileLock(run.launch_lock).take(seconds=LAUNCH_LOCK_SECONDS)
        alive_lock = FileLock(run.alive_lock).take(seconds=ORPHAN_SECONDS)
        _require_current(run, attempt)
        processes = _start(run, attempt, alive_lock, node)
    except (LockBusy, AttemptSuperseded, OSError, ValueError, KeyError) as error:
        return _report_launch_failure(attempt, error)
    # Imported only now: torchrun needs seconds to start, and the import of pydantic overlaps with them.
    from trainyard.worker.agent.supervisor import Supervisor

    try:
        supervisor = Supervisor.of(attempt, processes, node)
    except Exception as error:
        # Ranks without a supervisor must not continue.
        processes.kill()
        return _report_launch_failure(attempt, error)
    for signum in (signal.SIGTERM, signal.SIGINT, *((signal.SIGURG,) if node.clustered else ())):
        signal.signal(signum, supervisor.on_signal)
    while supervisor.try_step(time.monotonic()):
        time.sleep(TICK_SECONDS)
    alive_lock.release()
    supervisor.write_report()
    # Released before the report is delivered: the next attempt must not wait for a service that is down.
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
    """The attempt was given up, or a later one was started, before this agent started it."""


def _require_current(run: RunDir, attempt: AttemptDir) -> None:
    """Raise AttemptSuperseded if this agent is too late: its service was stopped between decision and launch.

    The caller holds the launch lock, so no other agent starts an attempt of this job meanwhile.
    """
    if attempt.closed.exists():
        raise AttemptSuperseded("the attempt was given up before its agent started")
    try:
        current = int(run.current.read_text())
    except (FileNotFoundError, ValueError):
        return
    if current > attempt.number:
        raise AttemptSuperseded(f"attempt {current} was started before attempt {attempt.number} was")


def _start(run: RunDir, attempt: AttemptDir, alive_lock: FileLock, node: NodeInfo) -> ProcessTree:
    # ``current`` is written while we hold the alive lock exclusively. A rank of an earlier attempt that is still
    # starting either holds that lock, and we do not get here, or it reads ``current`` and exits.
    run.current.write_text(str(attempt.number))
    alive_lock.take(shared=True)
    write_started(attempt)
    if attempt.prepare.exists():
        return ProcessTree(launch_preparation(run, attempt, alive_lock, node), ancestor=os.getpid(), has_ranks=False)
    torchrun = launch_torchrun(run, attempt, alive_lock, node, publish_endpoint(attempt, node))
    return ProcessTree(torchrun, ancestor=os.getpid())


def _report_launch_failure(attempt: AttemptDir, error: Exception) -> int:
    from trainyard.worker.agent.exit_report import launch_failed_report

    expected = isinstance(error, LockBusy | AttemptSuperseded)
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    print(f"agent: nothing was started: {message}", file=sys.stderr, flush=True)
    if not expected:
        traceback.print_exception(error)
    if not attempt.exit.exists():
        launch_failed_report(attempt, message)
    return EXIT_NOT_STARTED


if __name__ == "__main__":
    sys.exit(main())
