"""Static tokens: the one of the settings, and those of a token file, which may change while the service runs."""

import hmac
import logging
from pathlib import Path

from trainyard.service.errors import Unauthorized
from trainyard.service.ids import token_hash

log = logging.getLogger("trainyard")

Stat = tuple[int, int, int]
"""Inode, modification time and size: they show that the file has changed."""


class TokenFile:
    """The valid static tokens. ``file`` has one token per line and is read again when it changes.

    While the file cannot be read, the tokens read last stay valid. Tokens of the file are kept only as hashes.
    """

    def __init__(self, token: str | None, file: Path | None) -> None:
        self._fixed = (token_hash(token),) if token else ()
        self._file = file
        self._stat: Stat | None = None
        self._file_hashes: tuple[str, ...] = ()

    @property
    def is_required(self) -> bool:
        """Whether requests need a token."""
        return bool(self._fixed) or self._file is not None

    def require(self, token: str) -> None:
        """Raise Unauthorized if the token is not valid."""
        self._reload()
        digest = token_hash(token)
        # Every hash is compared, in constant time: the duration reveals nothing about the valid tokens.
        if sum(hmac.compare_digest(digest, valid) for valid in (*self._fixed, *self._file_hashes)) == 0:
            raise Unauthorized()

    def _reload(self) -> None:
        if self._file is None:
            return
        try:
            status = self._file.stat()
            stat = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stat != self._stat:
                self._file_hashes, self._stat = tuple(map(token_hash, parse_tokens(self._file))), stat
        except (OSError, ValueError):
            if self._stat is not None:
                log.warning("the token file cannot be read; the tokens read last stay valid")
            self._stat = None


def parse_tokens(file: Path) -> list[str]:
    """Return the tokens, one per line, without empty lines and # comments. Raises OSError or UnicodeDecodeError."""
    lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
