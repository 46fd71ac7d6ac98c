"""X-Forwarded-For, -Proto and -Host: taken from trusted proxies, ignored from all others. Pure.

Of each header the last value counts, which the proxy next to us has set; any client can send the values before it.
Why not uvicorn's ProxyHeadersMiddleware: docs/decisions/0014.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import Scope

Address = IPv4Address | IPv6Address

FOR, PROTO, HOST = "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"
SCHEMES = ("http", "https")


@dataclass(frozen=True)
class TrustedProxies:
    """The trusted proxies. If there are none, every such header is ignored."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "TrustedProxies":
        """Make it from addresses and networks. Raises ValueError."""
        return cls(tuple(ip_network(text.strip()) for text in texts if text.strip()))

    def rewrite_scope(self, scope: Scope) -> Scope:
        """Return the request as it reached the proxy: with the client's address, the scheme and the Host."""
        peer = address_in((scope.get("client") or ("",))[0])
        if peer is None or not self._trust(peer):
            return scope
        headers = Headers(scope=scope)
        client = self._client(peer, _values(headers, FOR))
        return {
            **scope,
            "client": (str(client), 0),
            "scheme": _scheme(scope, headers),
            "headers": _hosted(scope, headers),
        }

    def _client(self, peer: Address, chain: list[str]) -> Address:
        """Return the last address that is no trusted proxy, or a proxy if what it sent is no address."""
        while chain and self._trust(peer):
            before = address_in(chain.pop())
            if before is None:
                break
            peer = before
        return peer

    def _trust(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self.networks)


def address_in(text: str) -> Address | None:
    """Return the address in an item of X-Forwarded-For, which may have a port, or None if it has no address."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


def _values(headers: Headers, name: str) -> list[str]:
    return [part.strip() for value in headers.getlist(name) for part in value.split(",") if part.strip()]


def _scheme(scope: Scope, headers: Headers) -> str:
    scheme = (_values(headers, PROTO) or [""])[-1].lower()
    return scheme if scheme in SCHEMES else str(scope.get("scheme", "http"))


def _hosted(scope: Scope, headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return the headers with the Host that the client used. Whether it is an allowed one is checked later."""
    hosts = _values(headers, HOST)
    headers_of_scope: list[tuple[bytes, bytes]] = list(scope["headers"])
    if not hosts:
        return headers_of_scope
    return [*((n, v) for n, v in headers_of_scope if n != b"host"), (b"host", hosts[-1].encode("latin-1"))]
