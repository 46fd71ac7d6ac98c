"""Node rank and torchrun rendezvous of an attempt on several nodes. Standard library only.

A cluster starts one agent on each node. The first node's agent is the leader: it holds the locks, reports, and decides.
The others start their ranks and end with the leader: see `worker.agent.follower`.
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
"""Below the kernel's ephemeral range: no outgoing connection takes the chosen port before torchrun binds it. The range
is large, so that two jobs on a node seldom choose the same port."""

EXTERNAL_ADDRESS = "192.0.2.1"
"""An address reserved for documentation: its route is the default route of this host."""

SIOCGIFADDR = 0x8915


class RendezvousTimeout(Exception):
    """There is no rendezvous for this node: none was published in time, or the attempt is over."""


@dataclass(frozen=True)
class NodeInfo:
    """Node ``node`` of ``nodes``, from 0. ``leader_host``: the first node's address, as the other nodes reach it.

    ``clustered``: a cluster started the agent, and ends the node's processes once it no longer tracks the agent.
    """

    node: int = 0
    nodes: int = 1
    leader_host: str | None = None
    clustered: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Read the launcher's variables; without them this is the only node. Raises ValueError."""
        if "TRAINYARD_NODES" not in environment:
            return cls()
        node, nodes = int(environment["TRAINYARD_NODE"]), int(environment["TRAINYARD_NODES"])
        return cls(node, nodes, environment.get("TRAINYARD_FIRST_NODE") or None, clustered=True)

    @property
    def is_leader(self) -> bool:
        """Whether this is the first node, whose agent reports for the attempt."""
        return self.node == 0


SINGLE_NODE = NodeInfo()


@dataclass(frozen=True)
class RendezvousEndpoint:
    """The address of torchrun's rendezvous, which the first node hosts."""

    host: str
    port: int

    def torchrun_options(self, node: NodeInfo, attempt: str) -> list[str]:
        """Return torchrun's options. Host names need not resolve: the host and the local address are explicit."""
        return [
            f"--nnodes={node.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.host}:{self.port}",
            f"--rdzv-id={attempt}",
            f"--rdzv-conf=is_host={int(node.is_leader)}",
            f"--local-addr={address_towards(self.host)}",
        ]


LOOPBACK = RendezvousEndpoint("127.0.0.1", 0)
"""The rendezvous of a single node: its own name need not resolve. torchrun takes a free port for 0."""


def publish_endpoint(attempt: AttemptDir, node: NodeInfo) -> RendezvousEndpoint | None:
    """Choose a port on the first node and publish it to the others; return None if there is one node only."""
    if node.nodes == 1:
        return None
    endpoint = RendezvousEndpoint(_own_address(node), _free_port())
    for follower in range(1, node.nodes):
        # Create the empty exit records: a network file system caches for a minute that a file does not exist, and a
        # node whose record is seen too late would be reported lost. The content of an existing file is always fresh.
        attempt.node(follower).touch()
    write_json(attempt.rendezvous, asdict(endpoint))
    return endpoint


def _own_address(node: NodeInfo) -> str:
    """Return the address at which other nodes reach this one.

    The cluster's address may be valid on this node alone: many distributions resolve the own host name to 127.0.1.1.
    """
    if node.leader_host is not None and not is_loopback(node.leader_host):
        return node.leader_host
    try:
        return address_towards(EXTERNAL_ADDRESS)
    except OSError:  # no route: then all nodes are on this host
        return node.leader_host or socket.gethostname()


def _free_port() -> int:
    # If another process takes the port before torchrun binds it, the attempt fails and the next one chooses again.
    for port in random.sample(PORTS, 100):
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port
    raise OSError("none of a hundred ports is free for the rendezvous")


def wait_for_endpoint(attempt: AttemptDir, node: NodeInfo, seconds: float) -> RendezvousEndpoint:
    """Wait for the published endpoint; return it with the address that reaches it from here.

    Raises RendezvousTimeout after ``seconds``, or if the attempt has ended.
    """
    deadline = time.monotonic() + seconds
    while attempt.rendezvous.name not in _names(attempt):
        if attempt.exit.name in _names(attempt):
            raise RendezvousTimeout("the attempt had ended before this node joined")
        if time.monotonic() > deadline:
            raise RendezvousTimeout(f"the first node's agent published no rendezvous within {seconds:g} s")
        time.sleep(POLL_SECONDS)
    published = read_json(attempt.rendezvous)
    assert published is not None
    known = node.leader_host if node.leader_host is not None and not is_loopback(node.leader_host) else None
    return RendezvousEndpoint(known or str(published["host"]), int(published["port"]))


def can_reach(attempt: AttemptDir, seconds: float) -> bool:
    """Return whether this node sees the attempt's directory with its spec, waiting at most ``seconds``."""
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
    # Listed, not looked up: a network file system caches for a minute that a name does not exist.
    return os.listdir(attempt.path)


def address_towards(host: str) -> str:
    """Return this node's address on the route to ``host``. Sends nothing. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as connection:
        connection.connect(address)
        return str(connection.getsockname()[0])


def node_name() -> str:
    """Return the cluster's name of this node, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is a loopback address. A host name is not one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def interface_of(address: str) -> str | None:
    """Return the network interface that has this IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # the interface has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
