"""The limit of open files, and its division between connections and the service's own files.

Without a division the readers of streams use up all descriptors, and the health check and the agents get none.
"""

import errno
import logging
import resource
import time

MAX_SOFT_LIMIT = 65_536
"""The soft limit is not raised beyond this: some libraries close every possible descriptor in a child process."""

MAX_STREAMS = 1000
MAX_REQUESTS = 1024
WARNING_SECONDS = 60.0

EXHAUSTED = (errno.EMFILE, errno.ENFILE)

log = logging.getLogger("trainyard")


def raise_limit() -> None:
    """Raise the soft limit of open files to the hard limit, at most to MAX_SOFT_LIMIT."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_SOFT_LIMIT if hard == resource.RLIM_INFINITY else min(hard, MAX_SOFT_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def limit() -> int:
    """Return the limit of open files of this process."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_SOFT_LIMIT if soft == resource.RLIM_INFINITY else soft


def max_streams() -> int:
    """Return how many streams may be open."""
    return min(MAX_STREAMS, limit() // 4)


def max_requests() -> int:
    """Return how many requests of users, without streams, may run at once. Each may also have a file open."""
    return min(MAX_REQUESTS, limit() // 8)


def max_connections() -> int:
    """Return how many connections may be open.

    Requests and streams of users fill at most 6 in 10 of them; the rest is for agents, health checks, and connections
    without a request.
    """
    # A quarter is for the database, logs and other files of the service itself.
    return limit() - limit() // 4 - max_requests()


def is_exhausted(error: object) -> bool:
    """Return whether the error is a lack of descriptors."""
    return isinstance(error, OSError) and error.errno in EXHAUSTED


class LimitWarning:
    """Logs that the limit was reached, at most once a minute: it is reached thousands of times a second."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, consequence: str) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + WARNING_SECONDS
        log.warning(
            "%s: %d files may be open; raise the hard limit (ulimit -Hn, LimitNOFILE of systemd) or close streams; "
            "this line comes at most once a minute",
            consequence,
            limit(),
        )


warn = LimitWarning()
