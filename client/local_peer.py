"""Check which user's program listens on a port of this host, before a token is sent there.

If the service has ended, any user of the host may listen on its port and would receive the token. The kernel knows the
owner of every local socket, so no certificate is needed (docs/decisions/0018-proof-of-identity.md). Standard library
only and quick, because completion uses it.
"""

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SERVICE_USER = "TRAINYARD_SERVICE_USER"
"""The user, by name or number, that runs the service on this host."""

MAX_SYSTEM_UID = 999
"""Highest uid of a system account. People have higher ones."""

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
LISTEN = "0A"

Endpoint = tuple[str, int]


class _Socket(NamedTuple):
    local: Endpoint
    remote: Endpoint
    state: str
    uid: int
    accepted: bool


def distrust(connection: socket.socket) -> str | None:
    """Return why the program at the other end must not get a token, or None.

    Only programs on this host are checked. Also None if the kernel has no list of its sockets.
    """
    here, there = _endpoint(connection.getsockname()), _endpoint(connection.getpeername())
    if not ipaddress.ip_address(there[0]).is_loopback and here[0] != there[0]:
        return None
    for found in _sockets(there[1]):
        listens = found.state == LISTEN and found.local[0] in (there[0], "0.0.0.0", "::")  # noqa: S104 - compared
        # Until a connection is accepted, the kernel shows no owner of it, but its listener is still open.
        is_other_end = found.accepted and (found.local, found.remote) == (there, here)
        if (listens or is_other_end) and not _trusted(found.uid):
            return (
                f"the program that listens there runs as {_name(found.uid)}, so the token was not sent; if that user "
                f"runs the service, set {SERVICE_USER}={_name(found.uid)}"
            )
    return None


def _trusted(uid: int) -> bool:
    expected = os.environ.get(SERVICE_USER)
    if expected:
        return expected in (str(uid), _name(uid))
    return uid == os.geteuid() or uid <= MAX_SYSTEM_UID


def _name(uid: int) -> str:
    import pwd  # Not at the top: Windows, where there are no tables to read, has no such module.

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _sockets(port: int) -> Iterator[_Socket]:
    """Yield the sockets of this host whose local port is ``port``."""
    wanted = f":{port:04X}"
    for table in TABLES:
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, remote, state, _, _, _, uid, _, inode, *_ = line.split()
                if local.endswith(wanted):
                    yield _Socket(_decode(local), _decode(remote), state, int(uid), inode != "0")


def _decode(text: str) -> Endpoint:
    digits, _, port = text.partition(":")
    # The kernel prints an address as 32-bit numbers in the byte order of the host.
    packed = b"".join(struct.pack("=I", int(digits[at : at + 8], 16)) for at in range(0, len(digits), 8))
    return _plain(socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)), int(port, 16)


def _endpoint(name: tuple[str, int]) -> Endpoint:
    return _plain(name[0]), name[1]


def _plain(address: str) -> str:
    # A socket of both families has IPv4 addresses in IPv6 form.
    return address.removeprefix("::ffff:").partition("%")[0]
