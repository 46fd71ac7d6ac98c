"""Input and output of a command: data goes to stdout, everything else to stderr."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

from trainyard.client.cli.formatting import safe


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
        """Write a JSON document on one line."""
        print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=self.out, flush=True)

    def json_list(self, items: list[Any], has_more: bool = False) -> None:
        """Write a list as the API returns it."""
        self.json({"object": "list", "data": items, "has_more": has_more})

    def error(self, text: str) -> None:
        """Write a message to stderr."""
        print(safe(text), file=self.err, flush=True)

    def confirm(self, question: str) -> bool:
        """Ask yes or no. Enter means yes, the end of the input means no."""
        print(f"{question} [Y/n] ", end="", file=self.err, flush=True)
        answer = self.stdin.readline()
        return bool(answer) and answer.strip().lower() in ("", "y", "yes")
