"""The proof that the program at an address is the service of a home: both ends read a key that lies in the home.

Only the owner of the home may read the key. The proof covers the address and port at which the service received the
request: a program on another port cannot pass on the proof of the service (docs/decisions/0018-proof-of-identity.md).
Standard library only, because completion imports it.
"""

import hmac
import re

KEY_FILE = "service.key"
"""The file with the key, 64 hexadecimal digits, in the home."""

NONCE_HEADER = "Trainyard-Nonce"
PROOF_HEADER = "Trainyard-Proof"

NONCE = re.compile(r"[0-9a-f]{32,128}")
KEY = re.compile(r"[0-9a-f]{64}")


def parse_key(text: str) -> bytes | None:
    """Return the key in the content of its file, or None if there is none."""
    return bytes.fromhex(text.strip()) if KEY.fullmatch(text.strip()) else None


def prove_service(key: bytes, nonce: str, address: str, port: int) -> str:
    """Return the proof for a request that was sent with ``nonce`` to this address and port of the service."""
    return hmac.digest(key, f"trainyard-service {nonce} {plain_address(address)} {port}".encode(), "sha256").hex()


def plain_address(address: str) -> str:
    """Return an address without zone. A socket of both families has IPv4 addresses in IPv6 form."""
    return address.removeprefix("::ffff:").partition("%")[0]
