"""The request to stop: a file that the agent writes, or a signal."""

import faulthandler
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Self


class StopSignal:
    """A stop request by file or by signal. ``file`` is for rank 0 only; checking it costs one stat."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._signalled = False

    @classmethod
    def install_handlers(cls, file: Path | None) -> Self:
        """Also stop on SIGTERM and Ctrl-C. Print all stacks on SIGUSR2, to diagnose a hang."""
        stop = cls(file)
        signal.signal(signal.SIGTERM, stop.on_signal)
        signal.signal(signal.SIGINT, stop.on_signal)
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        return stop

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Remember the request; the current step is finished first. A second Ctrl-C does not wait for it."""
        if self._signalled and signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self._signalled = True

    def requested(self) -> bool:
        # Path.exists raises a temporary error of a network file system, which would end the run.
        return self._signalled or (self._file is not None and os.path.exists(self._file))
