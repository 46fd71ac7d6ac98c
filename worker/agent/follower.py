"""The agent on any node but the first: it starts its share of the ranks, watches them, and ends with the first node's.

It takes no part in any decision: a wish to stop reaches the ranks by the run directory or by SIGTERM, and ranks agree.
What it must see to is that nothing of the attempt is left on its node.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import (
    AttemptDir,
    RunDir,
    read_json,
    write_json,
)
from trainyard.worker.agent.processes import ProcessTree
from trainyard.worker.agent.rendezvous import (
    NodeInfo,
    RendezvousTimeout,
    node_name,
    wait_for_endpoint,
)
from trainyard.worker.agent.torchrun import launch_torchrun

PEER_EXIT_GRACE_SECONDS = 10.0

"""Ranks whose peers are gone end by themselves within moments; so long they get."""

EXIT_RECORD_SECONDS = PEER_EXIT_GRACE_SECONDS + 15.0

"""A node whose agent has not said how its ranks ended so long after ours did is lost."""

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class NodeExit:
    """How torchrun ended on one of the other nodes; ``status`` None: it was never started."""

    node: int
    name: str
    status: int | None
    message: str | None = None


class PeerNodes:
    """Looks for the words that the other nodes' agents leave. Times are of the monotonic clock, in seconds."""

    def __init__(self, attempt: AttemptDir, place: NodeInfo) -> None:
        self.ended: dict[int, NodeExit] = {}
        self._attempt = attempt
        self._all = range(1, place.nodes)
        self._looked_at = float("-inf")
        self._first_at: float | None = None

    def poll(self, now: float) -> None:
        """Read what is new."""
        if now - self._looked_at < POLL_SECONDS or not self.missing():
            return
        self._looked_at = now
        for node in self.missing():
            said = _exit_record(self._attempt, node)
            if said is not None:
                self.ended[node] = said
                self._first_at = self._first_at or now

    def lost(self, now: float) -> bool:
        """Whether ranks elsewhere ended so long ago that ours can only wait for nothing."""
        return self._first_at is not None and now - self._first_at > PEER_EXIT_GRACE_SECONDS

    def missing(self) -> list[int]:
        """Nodes whose agents have said nothing."""
        return [node for node in self._all if node not in self.ended]

    def wait_for_exits(self) -> None:
        """Return once all have said how they ended, or those that did not are taken for lost."""
        deadline = time.monotonic() + EXIT_RECORD_SECONDS
        while self.missing() and time.monotonic() < deadline:
            self._looked_at = float("-inf")
            self.poll(time.monotonic())
            time.sleep(0.05)


def _exit_record(attempt: AttemptDir, node: int) -> NodeExit | None:
    """What the node's agent has left; None where that is nothing, or nothing that can be read."""
    try:
        said = read_json(attempt.node(node))
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    status, message = said.get("status"), said.get("message")
    return NodeExit(
        node,
        str(said.get("name", node)),
        status if isinstance(status, int) else None,
        str(message) if message is not None else None,
    )


TICK_SECONDS = 0.1

LEADER_SECONDS = 120.0

LOCK_SECONDS = 10.0


def run_follower(run: RunDir, attempt: AttemptDir, place: NodeInfo) -> int:
    """Run this node's ranks to their end, and leave word of it.

    The exit code is 0 once the word is left, however they ended: at any other the cluster would end the first node's
    agent at once, before it has told why.
    """
    parent = os.getppid()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _defer_to_leader)
    try:
        children = _start(run, attempt, place)
    except (RendezvousTimeout, LockBusy, OSError, ValueError, KeyError, TypeError) as why:
        print(f"agent: nothing was started: {why}", file=sys.stderr, flush=True)
        _write_exit_record(attempt, place, None, str(why))
        return 0
    message = _watch(children, attempt, parent)
    children.kill()
    _write_exit_record(attempt, place, children.torchrun.returncode, message)
    return 0


def _start(run: RunDir, attempt: AttemptDir, place: NodeInfo) -> ProcessTree:
    meeting = wait_for_endpoint(attempt, place, LEADER_SECONDS)
    # The first node's agent said where to meet once the attempt was the current one, so what is read now is true.
    current = run.current.read_text().strip()
    if current != str(attempt.number):
        raise RendezvousTimeout(f"attempt {current} has followed this one")
    with FileLock(run.alive_lock).take(shared=True, seconds=LOCK_SECONDS) as alive:
        return ProcessTree(launch_torchrun(run, attempt, alive, place, meeting), ancestor=os.getpid())


def _watch(children: ProcessTree, attempt: AttemptDir, parent: int) -> str | None:
    """Return once torchrun has ended, or must be: with what is to be said of it then."""
    over_at: float | None = None
    while children.torchrun_status() is None:
        if os.getppid() != parent:
            return "the cluster lost sight of this node's agent"
        if over_at is None and attempt.over.exists():
            over_at = time.monotonic()
        if over_at is not None and time.monotonic() - over_at > PEER_EXIT_GRACE_SECONDS:
            return "the first node's ranks ended, and these did not follow"
        time.sleep(TICK_SECONDS)
    return None


def _write_exit_record(attempt: AttemptDir, place: NodeInfo, status: int | None, message: str | None) -> None:
    write_json(attempt.node(place.node), {"name": node_name(), "status": status, "message": message})


def _defer_to_leader(_signum: int, _frame: FrameType | None) -> None:
    """SIGTERM comes to all nodes; the first one's agent asks the ranks to save, and they agree among themselves."""
