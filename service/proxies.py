"""What a proxy says of the request it passes on: believed of those that are listed, and of nobody else. Pure.

Of each header the last value counts, which the proxy next to us has set; what stands before it may come from anybody.
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
class Proxies:
    """The proxies that are trusted. None: every such header is ignored."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Proxies":
        """From addresses and networks. Raises ValueError."""
        return cls(tuple(ip_network(text.strip()) for text in texts if text.strip()))

    def seen_through(self, scope: Scope) -> Scope:
        """The request as it reached the proxy: with the client's address, the scheme and the Host that were used."""
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
        """The last address of the chain that is no proxy of ours; a proxy where what it says is no address."""
        while chain and self._trust(peer):
            before = address_in(chain.pop())
            if before is None:
                break
            peer = before
        return peer

    def _trust(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self.networks)


def address_in(text: str) -> Address | None:
    """An address as it stands in X-Forwarded-For, with a port or without; None for what is none."""
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
    said = (_values(headers, PROTO) or [""])[-1].lower()
    return said if said in SCHEMES else str(scope.get("scheme", "http"))


def _hosted(scope: Scope, headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers, with the Host that the proxy was asked for. Whether it is one of ours is looked at behind this."""
    said = _values(headers, HOST)
    given: list[tuple[bytes, bytes]] = list(scope["headers"])
    if not said:
        return given
    return [*((name, value) for name, value in given if name != b"host"), (b"host", said[-1].encode("latin-1"))]
