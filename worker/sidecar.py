"""The worker's end of a side process: its connection to the service, and its low priority. See `contract.sidecar`."""

import json
import os
import queue
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from trainyard.contract.sidecar import DESCRIPTOR, encode_message

NICENESS = 10
OOM_SCORE = 800
"""If the host's memory is short, the kernel kills a side process long before a training run."""


class ServiceLink:
    """The connection to the service. A background thread reads it, and ends the process if the service is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        threading.Thread(target=self._read, name="service-link", daemon=True).start()

    @classmethod
    def from_environment(cls) -> Self:
        """Connect through the socket that the service has left open. Raises KeyError, ValueError or OSError."""
        # Removed, so that a child process does not use the number of this socket.
        return cls(socket.socket(fileno=int(os.environ.pop(DESCRIPTOR))))

    def receive(self, wait: bool) -> dict[str, Any] | None:
        """Return the next message; if there is none, wait for one, or return None."""
        try:
            return self._messages.get(block=wait)
        except queue.Empty:
            return None

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. The process ends if the service is gone."""
        try:
            with self._sending:
                self._connection.sendall(encode_message(message))
        except OSError:
            os._exit(0)

    def _read(self) -> None:
        with suppress(OSError, ValueError), self._connection.makefile("rb") as lines:
            for line in lines:
                self._messages.put(json.loads(line))
        # Not sys.exit: that would end this thread only, while the main thread may compute for minutes.
        os._exit(0)


def lower_priority() -> None:
    """Let training runs of this host go first: for the CPU, and if memory is short."""
    os.nice(NICENESS)
    # With autogroups, the kernel compares the niceness of sessions, not of processes.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
