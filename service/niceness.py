"""Let the ranks of this host have the cores first: the threads that serve requests get a higher niceness."""

import contextlib
import os
import threading

MAX_NICENESS = 19


def raise_niceness(by: int) -> None:
    """Add ``by`` to the niceness of this thread, and of the threads and processes that it starts from now on.

    On Linux a niceness belongs to a thread. What older threads start is not affected: that is how the scheduler's
    thread keeps its own for the agents. Only root could lower the niceness of an agent again.
    """
    thread = threading.get_native_id()
    # A container may forbid it, and the service works without.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, min(MAX_NICENESS, os.getpriority(os.PRIO_PROCESS, thread) + by))
