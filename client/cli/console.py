"""Where a command writes: data on stdout, everything else on stderr."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

from trainyard.client.cli.formatting import safe


@dataclass(frozen=True)
class Console:
    """The three streams. Tests give their own."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    into: TextIO = field(default_factory=lambda: sys.stdin)

    @property
    def interactive(self) -> bool:
        """Whether somebody sits there who can be asked."""
        return self.into.isatty() and self.out.isatty()

    @property
    def draws(self) -> bool:
        """Whether stdout can be drawn on in place."""
        return self.out.isatty() and os.environ.get("TERM") != "dumb"

    @property
    def colours(self) -> bool:
        """Whether ANSI colours are wanted: https://no-color.org."""
        return self.draws and not os.environ.get("NO_COLOR")

    def data(self, text: str) -> None:
        """What the command was asked for."""
        print(safe(text), file=self.out, flush=True)

    def lines(self, lines: Iterable[str]) -> None:
        """Several lines of data."""
        for line in lines:
            self.data(line)

    def raw(self, text: str) -> None:
        """A piece of data that brings its own line ends."""
        print(safe(text), end="", file=self.out, flush=True)

    def json(self, value: Any) -> None:
        """One JSON document on one line."""
        print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=self.out, flush=True)

    def error(self, text: str) -> None:
        """What is said beside the data."""
        print(safe(text), file=self.err, flush=True)

    def confirm(self, question: str) -> bool:
        """Ask yes or no; Enter is yes, the end of the input is no."""
        print(f"{question} [Y/n] ", end="", file=self.err, flush=True)
        answer = self.into.readline()
        return bool(answer) and answer.strip().lower() in ("", "y", "yes")
