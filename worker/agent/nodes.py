"""What the first node's agent knows of the others. Standard library only."""

import time
from dataclasses import dataclass

from trainyard.contract.rundir import AttemptDir, read_json
from trainyard.worker.agent.place import Place

PARTING_SECONDS = 10.0
"""Ranks whose peers are gone end by themselves within moments; so long they get."""

WORD_SECONDS = PARTING_SECONDS + 15.0
"""A node whose agent has not said how its ranks ended so long after ours did is lost."""

LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class NodeEnd:
    """How torchrun ended on one of the other nodes; ``status`` None: it was never started."""

    node: int
    name: str
    status: int | None
    message: str | None = None


class OtherNodes:
    """Looks for the words that the other nodes' agents leave. Times are of the monotonic clock, in seconds."""

    def __init__(self, attempt: AttemptDir, place: Place) -> None:
        self.ended: dict[int, NodeEnd] = {}
        self._attempt = attempt
        self._all = range(1, place.nodes)
        self._looked_at = float("-inf")
        self._first_at: float | None = None

    def look(self, now: float) -> None:
        """Read what is new."""
        if now - self._looked_at < LOOK_SECONDS or not self.missing():
            return
        self._looked_at = now
        for node in self.missing():
            said = _word(self._attempt, node)
            if said is not None:
                self.ended[node] = said
                self._first_at = self._first_at or now

    def deserted(self, now: float) -> bool:
        """Whether ranks elsewhere ended so long ago that ours can only wait for nothing."""
        return self._first_at is not None and now - self._first_at > PARTING_SECONDS

    def missing(self) -> list[int]:
        """Nodes whose agents have said nothing."""
        return [node for node in self._all if node not in self.ended]

    def wait(self) -> None:
        """Return once all have said how they ended, or those that did not are taken for lost."""
        deadline = time.monotonic() + WORD_SECONDS
        while self.missing() and time.monotonic() < deadline:
            self._looked_at = float("-inf")
            self.look(time.monotonic())
            time.sleep(0.05)


def _word(attempt: AttemptDir, node: int) -> NodeEnd | None:
    """What the node's agent has left; None where that is nothing, or nothing that can be read."""
    try:
        said = read_json(attempt.node(node))
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    status, message = said.get("status"), said.get("message")
    return NodeEnd(
        node,
        str(said.get("name", node)),
        status if isinstance(status, int) else None,
        str(message) if message is not None else None,
    )
