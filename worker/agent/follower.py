"""The agent of every node but the first: it starts its ranks, watches them, and ends with the first node's agent.

It decides nothing: a stop request reaches the ranks through the run directory or SIGTERM, and the ranks agree on it.
Its duty is that no process of the attempt is left on its node. `PeerNodes` is the first node's view of the followers.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import AttemptDir, RunDir, read_json, write_json
from trainyard.worker.agent.rendezvous import NodeInfo, RendezvousTimeout, node_name, wait_for_endpoint
from trainyard.worker.agent.torchrun import ProcessTree, launch_torchrun

PEER_EXIT_GRACE_SECONDS = 10.0
"""Grace period for ranks to exit after the ranks of another node have ended."""

EXIT_RECORD_SECONDS = PEER_EXIT_GRACE_SECONDS + 15.0
"""A node without an exit record this long after our ranks ended is lost."""

POLL_SECONDS = 0.5
TICK_SECONDS = 0.1
LEADER_SECONDS = 120.0
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class NodeExit:
    """How torchrun ended on a follower's node; ``status`` is None if it was never started."""

    node: int
    name: str
    status: int | None
    message: str | None = None


class PeerNodes:
    """Reads the exit records of the followers. Times are of the monotonic clock, in seconds."""

    def __init__(self, attempt: AttemptDir, node: NodeInfo) -> None:
        self.exits: dict[int, NodeExit] = {}
        self._attempt = attempt
        self._followers = range(1, node.nodes)
        self._polled_at = float("-inf")
        self._first_exit_at: float | None = None

    def poll(self, now: float) -> None:
        """Read new exit records, at most every POLL_SECONDS."""
        if now - self._polled_at < POLL_SECONDS or not self.missing():
            return
        self._polled_at = now
        for node in self.missing():
            node_exit = _read_exit_record(self._attempt, node)
            if node_exit is not None:
                self.exits[node] = node_exit
                self._first_exit_at = self._first_exit_at or now

    def lost(self, now: float) -> bool:
        """Return whether the ranks of another node ended so long ago that ours must be hung."""
        return self._first_exit_at is not None and now - self._first_exit_at > PEER_EXIT_GRACE_SECONDS

    def missing(self) -> list[int]:
        return [node for node in self._followers if node not in self.exits]

    def wait_for_exits(self) -> None:
        """Wait until all nodes have an exit record, for at most EXIT_RECORD_SECONDS."""
        deadline = time.monotonic() + EXIT_RECORD_SECONDS
        while self.missing() and time.monotonic() < deadline:
            self._polled_at = float("-inf")
            self.poll(time.monotonic())
            time.sleep(0.05)


def _read_exit_record(attempt: AttemptDir, node: int) -> NodeExit | None:
    try:
        record = read_json(attempt.node(node))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    status, message = record.get("status"), record.get("message")
    return NodeExit(
        node,
        str(record.get("name", node)),
        status if isinstance(status, int) else None,
        str(message) if message is not None else None,
    )


def run_follower(run: RunDir, attempt: AttemptDir, node: NodeInfo) -> int:
    """Run this node's ranks to their end, and write the exit record.

    Return 0 however the ranks ended: on any other exit code the cluster would end the first node's agent at once,
    before it has reported.
    """
    parent = os.getppid()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _leave_to_leader)
    try:
        processes = _start(run, attempt, node)
    except (RendezvousTimeout, LockBusy, OSError, ValueError, KeyError, TypeError) as error:
        print(f"agent: nothing was started: {error}", file=sys.stderr, flush=True)
        _write_exit_record(attempt, node, None, str(error))
        return 0
    message = _watch(processes, attempt, parent)
    processes.kill()
    _write_exit_record(attempt, node, processes.torchrun.returncode, message)
    return 0


def _start(run: RunDir, attempt: AttemptDir, node: NodeInfo) -> ProcessTree:
    endpoint = wait_for_endpoint(attempt, node, LEADER_SECONDS)
    # Read after the endpoint: the first node's agent publishes it only once this attempt is the current one.
    current = run.current.read_text().strip()
    if current != str(attempt.number):
        raise RendezvousTimeout(f"attempt {current} has followed this one")
    with FileLock(run.alive_lock).take(shared=True, seconds=LOCK_SECONDS) as alive:
        return ProcessTree(launch_torchrun(run, attempt, alive, node, endpoint), ancestor=os.getpid())


def _watch(processes: ProcessTree, attempt: AttemptDir, parent: int) -> str | None:
    """Wait until torchrun has ended, and return None; or until it must be killed, and return the reason."""
    over_at: float | None = None
    while processes.torchrun_status() is None:
        if os.getppid() != parent:
            return "the cluster lost sight of this node's agent"
        # Path.exists raises errors of a network file system. One such error would end the run on all nodes.
        if over_at is None and os.path.exists(attempt.over):
            over_at = time.monotonic()
        if over_at is not None and time.monotonic() - over_at > PEER_EXIT_GRACE_SECONDS:
            return "the first node's ranks ended, and these did not follow"
        time.sleep(TICK_SECONDS)
    return None


def _write_exit_record(attempt: AttemptDir, node: NodeInfo, status: int | None, message: str | None) -> None:
    write_json(attempt.node(node.node), {"name": node_name(), "status": status, "message": message})


def _leave_to_leader(_signum: int, _frame: FrameType | None) -> None:
    """Ignore SIGTERM: all nodes get it, and the first node's agent makes the ranks save."""
