"""Proofs of identity between an attempt's agent and its service. The attempt's token is never sent.

If the service has ended, another program may listen on its port. It must not get the token, and its responses must
have no effect. The exchange follows SCRAM (RFC 5802): the service stores only the SHA-256 of the token, the *key*. The
agent sends the token XOR an HMAC with the key, so that only a holder of the key can read it and only a holder of the
token can make it. The HMAC covers the request, and that of the response covers the request's nonce: neither can be used
for another request (docs/decisions/0018-proof-of-identity.md). Standard library only, because the agent imports it.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Self

SCHEME = "Trainyard-Attempt"
"""Scheme of the Authorization header: ``Trainyard-Attempt NONCE.BODY_SHA256.PROOF``, all in hexadecimal."""

ANSWER_HEADER = "Trainyard-Answer"

CREDENTIALS = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{64})\.((?:[0-9a-f]{2}){1,64})")


def key_of(token: str) -> str:
    """Return what the service stores in place of a token: its SHA-256 in hexadecimal."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


@dataclass(frozen=True)
class RequestProof:
    """The credentials of one request. ``path`` is the attempt's id and the resource: ``att_1/events``."""

    path: str
    nonce: str
    body_sha256: str
    proof: bytes

    @classmethod
    def of(cls, token: str, path: str, body: bytes) -> Self:
        """Return new credentials for a request with this body."""
        nonce, digest = secrets.token_hex(16), hashlib.sha256(body).hexdigest()
        return cls(path, nonce, digest, _xor(token.encode(), _request_mac(key_of(token), path, nonce, digest)))

    @classmethod
    def parse(cls, path: str, header: str) -> Self | None:
        """Return the credentials in an Authorization header, or None if it has none."""
        scheme, _, text = header.partition(" ")
        match = CREDENTIALS.fullmatch(text.strip())
        if scheme.lower() != SCHEME.lower() or match is None:
            return None
        return cls(path, match[1], match[2], bytes.fromhex(match[3]))

    @property
    def header(self) -> str:
        """The value of the Authorization header."""
        return f"{SCHEME} {self.nonce}.{self.body_sha256}.{self.proof.hex()}"

    def token(self, key: str) -> str:
        """Return the token that the sender has. It is the attempt's only if its `key_of` is ``key``."""
        mac = _request_mac(key, self.path, self.nonce, self.body_sha256)
        return _xor(self.proof, mac).decode(errors="replace")

    def covers(self, body: bytes) -> bool:
        """Return whether the credentials were made for this body."""
        return hmac.compare_digest(hashlib.sha256(body).hexdigest(), self.body_sha256)

    def answer(self, key: str, body: bytes) -> str:
        """Return the header that proves that the answer ``body`` comes from a holder of the key."""
        return hmac.digest(bytes.fromhex(key), f"answer {self.path} {self.nonce} ".encode() + body, "sha256").hex()

    def is_answered_by(self, key: str, header: str | None, body: bytes) -> bool:
        """Return whether the answer comes from a holder of the key, and is the answer to this request."""
        return hmac.compare_digest(self.answer(key, body).encode(), (header or "").encode(errors="replace"))


def _request_mac(key: str, path: str, nonce: str, body_sha256: str) -> bytes:
    # SHA-512: as long as the longest proof.
    return hmac.digest(bytes.fromhex(key), f"request {path} {nonce} {body_sha256}".encode(), "sha512")


def _xor(text: bytes, pad: bytes) -> bytes:
    if len(text) > len(pad):
        raise ValueError(f"a token has at most {len(pad)} bytes")
    return bytes(one ^ other for one, other in zip(text, pad, strict=False))
