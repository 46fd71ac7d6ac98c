"""Token ids to text, piece by piece: no piece ends within a character, or within a stop string."""

from collections.abc import Iterable, Sequence

from trainyard.worker.data.tokenizers import Tokenizer

BROKEN = "\ufffd"
MAX_BROKEN = 3
"""A character has at most four bytes, so up to three bytes at the end may wait for the rest of it."""

WINDOW = 32
"""Tokens that are decoded again with each new one. Decoding all of them would take quadratic time."""

OVERLAP = 4


class TextStream:
    """The text of one continuation. ``text``: all of it so far; ``stopped``: whether a stop string has ended it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        self._shown = 0  # characters of the decoded window that are part of `text`
        self._sent = 0
        self.text = ""
        self.stopped = False

    @property
    def sent(self) -> int:
        """Number of characters that were returned by `push` and `finish`."""
        return self._sent

    def push(self, token: int) -> str:
        """Add a token, and return the text that is complete with it, "" if none is."""
        self._ids.append(token)
        window = decode(self._tokenizer, self._ids)
        complete = window.rstrip(BROKEN)
        # More than three are no incomplete character, but bytes that are no text.
        self._extend(window, max(len(complete), len(window) - MAX_BROKEN))
        if len(self._ids) > WINDOW and complete == window:
            del self._ids[:-OVERLAP]
            self._shown = len(decode(self._tokenizer, self._ids))
        return self._send(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """Return the rest of the text."""
        window = decode(self._tokenizer, self._ids)
        self._extend(window, len(window))
        return self._send(len(self.text))

    def _extend(self, window: str, end: int) -> None:
        if self.stopped or end <= self._shown:
            return
        self.text += window[self._shown : end]
        self._shown = end
        # What was sent has no beginning of a stop string at its end.
        found = [at for stop in self._stops if (at := self.text.find(stop, self._sent)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self.text) - self._sent), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return length
        return 0

    def _send(self, end: int) -> str:
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of ``ids``, as valid Unicode."""
    # A lone surrogate cannot be written as JSON.
    return tokenizer.decode(ids).encode(errors="replace").decode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the name of one token in a list of log-probabilities: its text, or ``token_id:N`` if it has none."""
    if token == tokenizer.eos_id:
        return tokenizer.eos
    if token == tokenizer.bos_id:
        return tokenizer.bos
    text = decode(tokenizer, [token])
    return f"token_id:{token}" if not text or BROKEN in text else text
