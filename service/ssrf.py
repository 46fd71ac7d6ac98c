"""Protects against server-side request forgery: webhooks reach private networks only if the settings allow it.

A name is resolved once per delivery attempt, and the connection goes to the address that was checked. DNS rebinding
(a name that resolves to another address a moment later) has no effect.
"""

import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import SplitResult, urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Sequence[str]]

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
CLOUD_PLATFORM_NETWORKS = (ipaddress.IPv4Network("168.63.129.16/32"), ipaddress.IPv4Network("192.0.0.0/24"))
"""`ipaddress` calls these global, but cloud providers run internal services there."""

MAX_URL = 2000
PORTS = {"http": 80, "https": 443}


class AddressNotAllowed(Exception):
    """Webhooks may not be sent to the address. The message never has the address that a name resolved to."""


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name. Raises OSError, and UnicodeError if a part of the name is empty or too long."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def validation_error(url: str, allowed: Sequence[Network]) -> str | None:
    """Return why a webhook URL is rejected, or None if it is valid. The host name is not resolved."""
    parts = parse_url(url)
    if parts is None:
        return "must be an http or https URL with a host, without user, password or fragment"
    return host_error(parts.hostname or "", allowed)


def host_error(host: str, allowed: Sequence[Network]) -> str | None:
    """Return why nothing may be sent to the host, or None. A name other than localhost is not resolved."""
    literal = _literal(host)
    if literal is None and host.rstrip(".").rpartition(".")[2] == "localhost":
        literal = ipaddress.ip_address("127.0.0.1")
    return rejection_reason(literal, allowed) if literal is not None else None


def parse_url(url: str) -> SplitResult | None:
    """Return the parts of a webhook URL, or None if it is not a plain http or https URL."""
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    plain = parts.username is None and parts.password is None and not parts.fragment and port != 0
    return parts if parts.scheme in PORTS and parts.hostname and plain else None


def port_of(parts: SplitResult) -> int:
    """Return the port of the URL, or the scheme's default."""
    return parts.port or PORTS[parts.scheme]


def _literal(host: str) -> Address | None:
    """Return the address if the host is one, in any spelling that the system accepts: 127.1, 0x7f000001, 2130706433."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def resolve_allowed(addresses: Sequence[str], allowed: Sequence[Network]) -> list[str]:
    """Return the addresses of a name. Raises AddressNotAllowed if there is none, or one of them is not allowed."""
    if not addresses:
        raise AddressNotAllowed("the name has no address")
    for address in addresses:
        reason = rejection_reason(ipaddress.ip_address(address.partition("%")[0]), allowed)
        if reason is not None:
            raise AddressNotAllowed(reason)
    return list(addresses)


def rejection_reason(address: Address, allowed: Sequence[Network]) -> str | None:
    """Return why webhooks may not reach this address, or None. IPv4 addresses embedded in it are checked instead."""
    for one in tuple(_embedded_ipv4(address)) or (address,):
        if not (_is_public(one) or any(one in network for network in allowed)):
            return "resolves to an address that is not public; allow its network with TRAINYARD_WEBHOOK_NETWORKS"
    return None


def _is_public(address: Address) -> bool:
    if (
        any(address in network for network in CLOUD_PLATFORM_NETWORKS)
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
    ):
        return False
    return address.is_global and not (isinstance(address, ipaddress.IPv6Address) and address.is_site_local)


def _embedded_ipv4(address: Address) -> Iterator[Address]:
    """Yield the IPv4 addresses embedded in an IPv6 address: mapped, 6to4, Teredo, NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in NAT64:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
