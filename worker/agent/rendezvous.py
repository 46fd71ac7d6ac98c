"""Which of an attempt's nodes this is, and where the ranks of all of them meet. Standard library only.

A cluster starts one agent on each node. The first node's agent leads: it holds the locks, reports, and decides. The
others start their share of the ranks and end with it: see `worker.agent.follower`.
"""

import fcntl
import ipaddress
import os
import random
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from trainyard.contract.rundir import AttemptDir, read_json, write_json

POLL_SECONDS = 0.1

PORTS = range(20000, 32768)
"""Below those that the kernel gives away itself: an outgoing connection takes none of these in the seconds until
torchrun binds the one that was chosen, and two jobs on a node seldom choose the same."""

OUTSIDE = "192.0.2.1"
"""An address kept for examples: the way there is the way out of this host."""

SIOCGIFADDR = 0x8915


class RendezvousTimeout(Exception):
    """The first node's agent did not say where to meet."""


@dataclass(frozen=True)
class NodeInfo:
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
    def is_leader(self) -> bool:
        """Whether this node's agent speaks for the attempt."""
        return self.node == 0


SINGLE_NODE = NodeInfo()


@dataclass(frozen=True)
class RendezvousEndpoint:
    """Where torchrun's rendezvous is: the first node hosts it."""

    host: str
    port: int

    def torchrun_options(self, place: NodeInfo, attempt: str) -> list[str]:
        """torchrun's. Names of nodes need not resolve: who hosts is said, and each node gives its address."""
        return [
            f"--nnodes={place.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.host}:{self.port}",
            f"--rdzv-id={attempt}",
            f"--rdzv-conf=is_host={int(place.is_leader)}",
            f"--local-addr={address_towards(self.host)}",
        ]


def publish_endpoint(attempt: AttemptDir, place: NodeInfo) -> RendezvousEndpoint | None:
    """The first node's agent chooses a port and says so; None where there is nobody to meet."""
    if place.nodes == 1:
        return None
    meeting = RendezvousEndpoint(_own_address(place), _free_port())
    for node in range(1, place.nodes):
        # The others' words, empty: that a name is there is asked of a network file system anew each time it is read;
        # that it was not is remembered for a minute, and a node that did say how its ranks ended would be lost.
        attempt.node(node).touch()
    write_json(attempt.rendezvous, asdict(meeting))
    return meeting


def _own_address(place: NodeInfo) -> str:
    """The address at which other nodes reach this one: what the cluster gives the node itself may be good on it alone.

    Many distributions have the node's own name lead to 127.0.1.1, and so a cluster's program that asks there.
    """
    if place.first is not None and not is_loopback(place.first):
        return place.first
    try:
        return address_towards(OUTSIDE)
    except OSError:  # no way out: then all nodes are on this host
        return place.first or socket.gethostname()


def _free_port() -> int:
    """Free now, and bound by torchrun in a moment; who was faster meanwhile costs one attempt, nothing else."""
    for port in random.sample(PORTS, 100):
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port
    raise OSError("none of a hundred ports is free for the rendezvous")


def wait_for_endpoint(attempt: AttemptDir, place: NodeInfo, seconds: float) -> RendezvousEndpoint:
    """Where the first node's agent said to meet, by the address that leads there from here. Raises NoMeeting."""
    deadline = time.monotonic() + seconds
    while attempt.rendezvous.name not in _names(attempt):
        if attempt.exit.name in _names(attempt):
            raise RendezvousTimeout("the attempt had ended before this node joined")
        if time.monotonic() > deadline:
            raise RendezvousTimeout(f"the first node's agent did not say where to meet within {seconds:g} s")
        time.sleep(POLL_SECONDS)
    said = read_json(attempt.rendezvous)
    assert said is not None
    heard_from = place.first if place.first is not None and not is_loopback(place.first) else None
    return RendezvousEndpoint(heard_from or str(said["host"]), int(said["port"]))


def can_reach(attempt: AttemptDir, seconds: float) -> bool:
    """Whether this node has the attempt's directory, as the service has left it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if attempt.spec.name in _names(attempt):
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _names(attempt: AttemptDir) -> list[str]:
    # Listed, not looked up: a network file system remembers for a minute that a name was not there.
    return os.listdir(attempt.path)


def address_towards(host: str) -> str:
    """The address that this node has on the way to ``host``. Nothing is sent. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(address)
        return str(way.getsockname()[0])


def node_name() -> str:
    """What the cluster calls this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_loopback(host: str) -> bool:
    """Whether ``host`` is an address that leads to this host from everywhere. A name is none."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
