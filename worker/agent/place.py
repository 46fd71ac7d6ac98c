"""Which of an attempt's nodes this is, and where the ranks of all of them meet. Standard library only.

A cluster starts one agent on each node. The first node's agent leads: it holds the locks, reports, and decides. The
others start their share of the ranks and end with it: see `worker.agent.follow`.
"""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from contract.rundir import AttemptDir, read_json, write_json

POLL_SECONDS = 0.1


class NoMeeting(Exception):
    """The first node's agent did not say where to meet."""


@dataclass(frozen=True)
class Place:
    """Node ``node`` of ``nodes``, counted from 0. ``first``: the first node's address, as the others reach it.

    ``clustered``: a cluster started the agent, and ends what runs on the node once it loses sight of it.
    """

    node: int = 0
    nodes: int = 1
    first: str | None = None
    clustered: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """As the cluster's launcher said; without a word the only node of all. Raises ValueError."""
        if "TRAINYARD_NODES" not in environment:
            return cls()
        node, nodes = int(environment["TRAINYARD_NODE"]), int(environment["TRAINYARD_NODES"])
        return cls(node, nodes, environment.get("TRAINYARD_FIRST_NODE") or None, clustered=True)

    @property
    def leads(self) -> bool:
        """Whether this node's agent speaks for the attempt."""
        return self.node == 0


ALONE = Place()


@dataclass(frozen=True)
class Meeting:
    """Where torchrun's rendezvous is: the first node hosts it."""

    host: str
    port: int

    def options(self, place: Place, attempt: str) -> list[str]:
        """torchrun's. Names of nodes need not resolve: who hosts is said, and each node gives its address."""
        return [
            f"--nnodes={place.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.host}:{self.port}",
            f"--rdzv-id={attempt}",
            f"--rdzv-conf=is_host={int(place.leads)}",
            f"--local-addr={address_towards(self.host)}",
        ]


def appoint(attempt: AttemptDir, place: Place) -> Meeting | None:
    """The first node's agent chooses a port and says so; None where there is nobody to meet."""
    if place.nodes == 1:
        return None
    host = place.first or socket.gethostname()
    # The port is free now and bound by torchrun in a moment; who was faster meanwhile costs one attempt, nothing else.
    with socket.create_server(("", 0)) as probe:
        meeting = Meeting(host, probe.getsockname()[1])
    write_json(attempt.rendezvous, asdict(meeting))
    return meeting


def await_meeting(attempt: AttemptDir, seconds: float) -> Meeting:
    """Where the first node's agent said to meet. Raises NoMeeting."""
    deadline = time.monotonic() + seconds
    while attempt.rendezvous.name not in _names(attempt):
        if attempt.exit.name in _names(attempt):
            raise NoMeeting("the attempt had ended before this node joined")
        if time.monotonic() > deadline:
            raise NoMeeting(f"the first node's agent did not say where to meet within {seconds:g} s")
        time.sleep(POLL_SECONDS)
    said = read_json(attempt.rendezvous)
    assert said is not None
    return Meeting(str(said["host"]), int(said["port"]))


def _names(attempt: AttemptDir) -> list[str]:
    # Listed, not looked up: a network file system remembers for a minute that a name was not there.
    return os.listdir(attempt.path)


def address_towards(host: str) -> str:
    """The address that this node has on the way to ``host``. Nothing is sent. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(address)
        return str(way.getsockname()[0])
