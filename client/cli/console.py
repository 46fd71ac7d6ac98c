"""Input and output of a command: data goes to stdout, everything else to stderr."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

from trainyard.client.cli.formatting import safe
from trainyard.client.exit_codes import UsageError


@dataclass(frozen=True)
class Console:
    """The three streams of the process, or those of a test."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    stdin: TextIO = field(default_factory=lambda: sys.stdin)

    @property
    def interactive(self) -> bool:
        """Whether a user can be asked."""
        return self.stdin.isatty() and self.out.isatty()

    @property
    def can_redraw(self) -> bool:
        """Whether stdout is a terminal on which lines can be replaced."""
        return self.out.isatty() and os.environ.get("TERM") != "dumb"

    @property
    def uses_colour(self) -> bool:
        """Whether to write ANSI colours, see https://no-color.org."""
        return self.can_redraw and not os.environ.get("NO_COLOR")

    def data(self, text: str) -> None:
        """Write data to stdout, and end the line."""
        print(safe(text), file=self.out, flush=True)

    def lines(self, lines: Iterable[str]) -> None:
        """Write several lines of data."""
        for line in lines:
            self.data(line)

    def raw(self, text: str) -> None:
        """Write data that has its own line ends."""
        print(safe(text), end="", file=self.out, flush=True)

    def json(self, value: Any) -> None:
        """Write a JSON document on one line, with escapes if stdout is not UTF-8."""
        escapes = not is_utf8(self.out)
        print(json.dumps(value, ensure_ascii=escapes, allow_nan=False), file=self.out, flush=True)

    def json_list(self, items: list[Any], has_more: bool = False) -> None:
        """Write a list as the API returns it."""
        self.json({"object": "list", "data": items, "has_more": has_more})

    def error(self, text: str) -> None:
        """Write a message to stderr."""
        print(safe(text), file=self.err, flush=True)

    def read_stdin(self) -> str:
        """Return all of stdin as UTF-8, without a byte order mark, whatever the locale is. Raises UsageError."""
        binary = getattr(self.stdin, "buffer", None)
        try:
            return self.stdin.read() if binary is None else str(binary.read(), "utf-8-sig")
        except UnicodeError as error:
            raise UsageError(f"the text on stdin is not UTF-8: {error}") from None

    def read_line(self) -> str:
        """Return the next line of stdin, "" at its end. Raises UsageError if it is not text."""
        try:
            return self.stdin.readline()
        except UnicodeError as error:
            raise UsageError(f"the text on stdin cannot be read: {error}") from None

    def confirm(self, question: str) -> bool:
        """Ask yes or no. Enter means yes, the end of the input means no."""
        return self._answer(f"{safe(question)} [Y/n] ") in ("", "y", "yes")

    def require_consent(self, question: str, yes: bool) -> bool:
        """Ask before something is lost; Enter means no. ``yes``: the option -y was given.

        Raises UsageError if no user can be asked and -y was not given.
        """
        if yes:
            return True
        if not self.interactive:
            raise UsageError(
                "nothing was changed: this cannot be undone, and there is no terminal to ask on. "
                f"-y confirms it: {question}"
            )
        return self._answer(f"{safe(question)} [y/N] ") in ("y", "yes")

    def _answer(self, prompt: str) -> str | None:
        print(prompt, end="", file=self.err, flush=True)
        line = self.read_line()
        return line.strip().lower() if line else None


def is_utf8(stream: TextIO) -> bool:
    """Return whether ``stream`` can hold every character."""
    return (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf")
