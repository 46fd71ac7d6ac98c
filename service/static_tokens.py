"""Who may come in: the token of the settings, and those of a file that may change while the service runs."""

import hmac
import logging
from pathlib import Path

from trainyard.service.errors import Unauthorized
from trainyard.service.ids import token_hash

log = logging.getLogger("trainyard")

Mark = tuple[int, int, int]


class TokenFile:
    """The tokens that are good now. ``file`` holds one a line; it is read again when it changes.

    Of a file's tokens only hashes are kept. While the file cannot be read, those read last stay good; one without a
    token lets nobody in by it.
    """

    def __init__(self, token: str | None, file: Path | None) -> None:
        self._fixed = (token_hash(token),) if token else ()
        self._file = file
        self._mark: Mark | None = None
        self._read: tuple[str, ...] = ()

    @property
    def is_required(self) -> bool:
        """Whether anybody needs one."""
        return bool(self._fixed) or self._file is not None

    def require(self, given: str) -> None:
        """Raise Unauthorized unless ``given`` is one of them; the time it takes tells nothing of them."""
        self._look()
        mine = token_hash(given)
        if sum(hmac.compare_digest(mine, known) for known in (*self._fixed, *self._read)) == 0:
            raise Unauthorized()

    def _look(self) -> None:
        if self._file is None:
            return
        try:
            found = self._file.stat()
            mark = (found.st_ino, found.st_mtime_ns, found.st_size)
            if mark != self._mark:
                self._read, self._mark = tuple(map(token_hash, parse_tokens(self._file))), mark
        except (OSError, ValueError):
            if self._mark is not None:
                log.warning("the token file cannot be read; the tokens read last stay good")
            self._mark = None


def parse_tokens(file: Path) -> list[str]:
    """One a line; empty lines and those that begin with # are none. Raises OSError, and ValueError for no UTF-8."""
    lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
