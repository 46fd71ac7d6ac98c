"""Check which program listens on a port of this host, before a token is sent there.

If the service has ended, any user of the host may listen on its port and would receive the token. Two checks prevent
this: the kernel names the owner of every local socket, and the service proves that it has the key of its home. Neither
needs a certificate (docs/decisions/0018-proof-of-identity.md). Standard library only and quick, because completion uses
it.
"""

import contextlib
import hmac
import http.client
import ipaddress
import json
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from trainyard.contract.service_proof import (
    KEY_FILE,
    NONCE_HEADER,
    PROOF_HEADER,
    parse_key,
    plain_address,
    prove_service,
)

SERVICE_USER = "TRAINYARD_SERVICE_USER"
"""The user, by name or number, that runs the service on this host."""

ANY_USER = "any"
"""Value of SERVICE_USER that turns the checks off."""

HOME = "TRAINYARD_HOME"
DEFAULT_HOME = "trainyard-home"

MAX_SYSTEM_UID = 999
"""Highest uid of a system account. People have higher ones."""

MAX_SECONDS = 10.0
MAX_BYTES = 1 << 16

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
LISTEN = "0A"

Endpoint = tuple[str, int]


class UntrustedListener(Exception):
    """The program that listens on the service's address must not get a token. The message says why and what to do."""


class _Socket(NamedTuple):
    local: Endpoint
    remote: Endpoint
    state: str
    uid: int
    accepted: bool


@dataclass(frozen=True)
class _Home:
    """The home of the service that is expected at an address. ``key`` is None if this user may not read it."""

    path: Path
    key: bytes | None


def require_service(connection: socket.socket, url: str) -> None:
    """Check that a new connection to ``url`` ends at the service, if it ends on this host. No token is sent.

    Raises:
        UntrustedListener: it does not, or that cannot be found out.
        OSError: there is no response, or one that says that the service cannot be reached now.
    """
    here, there = _endpoint(connection.getsockname()), _endpoint(connection.getpeername())
    if not ipaddress.ip_address(there[0]).is_loopback and here[0] != there[0]:
        return
    named = os.environ.get(SERVICE_USER)
    if named == ANY_USER:
        return
    owners = _owners(here, there)
    reason = _distrusted(owners or ())
    if reason is not None:
        raise UntrustedListener(reason)
    home = _expected_home(there[1])
    if home is not None and home.key is None and not named:
        _require_owner_of(home.path, owners or ())
    nonce = secrets.token_hex(16)
    proof = _ask_for_proof(connection, url, there, nonce)
    if home is not None and home.key is not None:
        if not hmac.compare_digest(proof.encode(errors="replace"), prove_service(home.key, nonce, *there).encode()):
            raise UntrustedListener(_WRONG_PROOF.format(home=home.path))
    elif owners is None:
        raise UntrustedListener(_UNCHECKED)


_WRONG_PROOF = (
    "the program that listens there does not have the key of the service in {home}, so the token was not sent; if that "
    f"service is behind a proxy, use its own address; if another one is meant, set {HOME} to its home or unset it; if "
    f"a service of release 0.1 runs in this home, remove {KEY_FILE} from it"
)
_UNCHECKED = (
    f"this system does not show whose program listens there, so the token was not sent; set {HOME} to the home of the "
    f"service, whose key is checked then, use https, or set {SERVICE_USER}={ANY_USER} if all programs of this host are "
    "trusted"
)


def _distrusted(owners: tuple[int, ...]) -> str | None:
    """Return why a program of these users must not get a token, or None."""
    for uid in owners:
        if not _trusted(uid):
            return (
                f"the program that listens there runs as {_name(uid)}, so the token was not sent; if that user "
                f"runs the service, set {SERVICE_USER}={_name(uid)}"
            )
    return None


def _trusted(uid: int) -> bool:
    expected = os.environ.get(SERVICE_USER)
    if expected:
        return expected in (str(uid), _name(uid))
    return uid == os.geteuid() or uid <= MAX_SYSTEM_UID


def _expected_home(port: int) -> _Home | None:
    """Return the home of the service at this port: the one that is named, or the default one if it names this port."""
    named = os.environ.get(HOME)
    path = Path(named or DEFAULT_HOME)
    try:
        if not named and urlsplit(json.loads((path / "service.json").read_text())["url"]).port != port:
            return None
        key = parse_key((path / KEY_FILE).read_text("ascii"))
        return None if key is None else _Home(path.resolve(), key)
    except PermissionError:
        return _Home(path, None) if named else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # Not started yet, or by release 0.1, which makes no key.


def _require_owner_of(home: Path, owners: tuple[int, ...]) -> None:
    """Raise UntrustedListener unless the program runs as the owner of a home whose key this user may not read."""
    owner = None
    with contextlib.suppress(OSError):
        owner = home.stat().st_uid
    if owner is not None and owner in owners:
        return
    raise UntrustedListener(
        f"only {'its owner' if owner is None else _name(owner)} may read the key of the service in {home}, and the "
        "program that listens there does not run as this user, so the token was not sent; set "
        f"{SERVICE_USER} to the user that runs the service, or unset {HOME}"
    )


def _ask_for_proof(connection: socket.socket, url: str, there: Endpoint, nonce: str) -> str:
    """Ask for a proof on this very connection, and return it; "" if a service of release 0.1 answers."""
    parts = urlsplit(url)
    is_proxy = not ends_at(there, parts.hostname or "", parts.port or 80)
    not_a_service = UntrustedListener(_PROXY if is_proxy else _NO_SERVICE)
    # A request to a proxy has the full URL.
    origin = f"http://{parts.netloc.rpartition('@')[2]}" if is_proxy else ""
    before = connection.gettimeout()
    connection.settimeout(MAX_SECONDS if before is None else before)
    asking = http.client.HTTPConnection(parts.hostname or "", parts.port or 80)
    asking.sock = connection
    try:
        asking.request("GET", f"{origin}{parts.path.rstrip('/')}/health", headers={NONCE_HEADER: nonce})
        response = asking.getresponse()
        body = response.read(MAX_BYTES)
    except OSError:
        raise  # Also RemoteDisconnected, which is an HTTPException too.
    except http.client.HTTPException as error:
        raise not_a_service from error
    finally:
        asking.sock = None  # The caller continues to use the connection.
        if connection.fileno() >= 0:
            connection.settimeout(before)
    if response.status in (502, 503, 504):
        raise ConnectionError(f"it answers {response.status}")
    if response.status != 200 or not _is_health(body):
        raise not_a_service
    if response.will_close:
        # As a service that is ending does. The next connection could reach another program.
        raise ConnectionError("it closes the connection that was checked")
    return response.headers.get(PROOF_HEADER, "")


_NO_SERVICE = "the program there is not a Trainyard service, so the token was not sent"
_PROXY = (
    "the proxy of this host (HTTP_PROXY) does not lead to a Trainyard service, so the token was not sent; NO_PROXY "
    "lists the hosts that are reached without a proxy"
)


def ends_at(endpoint: Endpoint, host: str, port: int) -> bool:
    """Return whether a direct connection to ``host`` has this remote endpoint. If not, a proxy is in between."""
    if endpoint[1] != port:
        return False
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False  # only the proxy can resolve the name
    addresses = {plain_address(str(address[0])) for *_, address in found}
    # The remote endpoint of a connection to 0.0.0.0 is 127.0.0.1.
    return not addresses.isdisjoint({endpoint[0], "0.0.0.0", "::"})  # noqa: S104 - compared


def _is_health(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["status"] == "ok")
    except (ValueError, KeyError, TypeError):
        return False


def _name(uid: int) -> str:
    import pwd  # Not at the top: Windows, where there are no tables to read, has no such module.

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _owners(here: Endpoint, there: Endpoint) -> tuple[int, ...] | None:
    """Return the users of the programs that listen at ``there`` or have the other end, or None if that is unknown.

    Empty if no program of this host does: the kernel passes the connection on, to a container for example, as root has
    configured it.
    """
    tables = [table for table in map(Path, TABLES) if os.access(table, os.R_OK)]
    if not tables:
        return None
    found = []
    for one in _sockets(tables, there[1]):
        listens = one.state == LISTEN and one.local[0] in (there[0], "0.0.0.0", "::")  # noqa: S104 - compared
        # Until a connection is accepted, the kernel shows no owner of it, but its listener is still open.
        is_other_end = one.accepted and (one.local, one.remote) == (there, here)
        if listens or is_other_end:
            found.append(one.uid)
    return tuple(found)


def _sockets(tables: list[Path], port: int) -> Iterator[_Socket]:
    """Yield the sockets of this host whose local port is ``port``."""
    wanted = f":{port:04X}"
    for table in tables:
        for line in table.read_text().splitlines()[1:]:
            _, local, remote, state, _, _, _, uid, _, inode, *_ = line.split()
            if local.endswith(wanted):
                yield _Socket(_decode(local), _decode(remote), state, int(uid), inode != "0")


def _decode(text: str) -> Endpoint:
    digits, _, port = text.partition(":")
    # The kernel prints an address as 32-bit numbers in the byte order of the host.
    packed = b"".join(struct.pack("=I", int(digits[at : at + 8], 16)) for at in range(0, len(digits), 8))
    return plain_address(socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)), int(
        port, 16
    )


def _endpoint(name: tuple[str, int]) -> Endpoint:
    return plain_address(name[0]), name[1]
