"""X-Forwarded-For, -Proto, -Host and -Prefix: used if a trusted proxy sent them, ignored otherwise.

The last value of a header is the one that the nearest proxy has set; any client can send the values before it.
Why not uvicorn's ProxyHeadersMiddleware: docs/decisions/0014.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import Scope

Address = IPv4Address | IPv6Address

FOR, PROTO, HOST, PREFIX = "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-prefix"
VALID_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]{1,100}){1,8}/?")
SCHEMES = ("http", "https")


@dataclass(frozen=True)
class TrustedProxies:
    """Networks of the trusted proxies."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "TrustedProxies":
        """Parse addresses and networks. Raises ValueError."""
        return cls(tuple(ip_network(text.strip()) for text in texts if text.strip()))

    def rewrite_scope(self, scope: Scope) -> Scope:
        """Return the request as the first proxy received it: the client's address, the scheme and the Host.

        ``forwarded_prefix`` in it is the path prefix that the proxy has removed, or "".
        """
        if not self.networks:
            return scope
        peer = parse_address((scope.get("client") or ("",))[0])
        if peer is None or not self._trust(peer):
            return scope
        headers = Headers(scope=scope)
        client = self._client(peer, _values(headers, FOR))
        scheme = (_values(headers, PROTO) or [""])[-1].lower()
        return {
            **scope,
            "client": (str(client), 0),
            "scheme": scheme if scheme in SCHEMES else scope.get("scheme", "http"),
            "headers": _headers(scope, headers),
            "forwarded_prefix": _prefix(headers),
        }

    def _client(self, peer: Address, chain: list[str]) -> Address:
        """Return the last address in the chain that is not a trusted proxy."""
        while chain and self._trust(peer):
            previous = parse_address(chain.pop())
            if previous is None:
                break
            peer = previous
        return peer

    def _trust(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self.networks)


def parse_address(text: str) -> Address | None:
    """Return the address of an item of X-Forwarded-For, which may have a port, or None if it is invalid."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _values(headers: Headers, name: str) -> list[str]:
    return [part.strip() for value in headers.getlist(name) for part in value.split(",") if part.strip()]


def _prefix(headers: Headers) -> str:
    prefix = (_values(headers, PREFIX) or [""])[-1]
    return prefix.rstrip("/") if VALID_PREFIX.fullmatch(prefix) else ""


def _headers(scope: Scope, headers: Headers) -> list[tuple[bytes, bytes]]:
    # RequestMiddleware checks later whether this Host is allowed.
    hosts = _values(headers, HOST)
    raw: list[tuple[bytes, bytes]] = list(scope["headers"])
    if not hosts:
        return raw
    return [*((name, value) for name, value in raw if name != b"host"), (b"host", hosts[-1].encode("latin-1"))]
