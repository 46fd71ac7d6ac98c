"""How a run hears that it shall stop: a file, SIGTERM, or Ctrl-C. All mean: save at the next step and end well."""

import faulthandler
import signal
from pathlib import Path
from types import FrameType
from typing import Self


class StopWish:
    """Whether this process was asked to stop. Looking costs one stat; only rank 0 looks at the file."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._signalled = False

    @classmethod
    def heard_by_signal(cls, file: Path | None) -> Self:
        """Also listen to SIGTERM and Ctrl-C, and print all stacks on SIGUSR2: that is how a hang is looked into."""
        wish = cls(file)
        signal.signal(signal.SIGTERM, wish.on_signal)
        signal.signal(signal.SIGINT, wish.on_signal)
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        return wish

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Only remember: the step under way is finished first. A second Ctrl-C does not wait for it."""
        if self._signalled and signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self._signalled = True

    def asked(self) -> bool:
        """Whether to stop."""
        return self._signalled or (self._file is not None and self._file.exists())
