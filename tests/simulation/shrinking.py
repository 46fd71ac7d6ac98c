"""A failing history made short: delta debugging over its events, and the rest printed as a test."""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from tests.simulation.simulated_cluster import Event, replay

T = TypeVar("T")


def shrink(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """Return a sublist of ``items`` that fails, and no longer fails without any one of its items.

    Zeller's ddmin: leave out ever smaller chunks, as long as the rest fails.
    """
    left, chunk = list(items), len(items)
    while chunk:
        start, before = 0, len(left)
        while start < len(left):
            rest = left[:start] + left[start + chunk :]
            if fails(rest):
                left = rest
            else:
                start += chunk
        # A chunk that could not be left out before may be able to after a later one was.
        chunk = chunk if len(left) < before else chunk // 2
    return left


def failure_of(seed: int, events: Sequence[Event]) -> str | None:
    """Return which invariant ``events`` break, without the names of jobs, or None."""
    try:
        replay(seed, events)
    except Exception as error:
        return signature(error)
    return None


def signature(error: Exception) -> str:
    """Return the error without what differs if other events are left out: the numbers of jobs and attempts."""
    return f"{type(error).__name__}: {re.sub(r'[0-9]+', '#', str(error))}"


def as_test(seed: int, events: Sequence[Event], error: Exception) -> str:
    """Return the shortest list of ``events`` that still breaks the same invariant, as the code of a test."""
    wanted = signature(error)
    short = shrink(events, lambda some: failure_of(seed, some) == wanted)
    lines = [f"        ({event.name!r}, {event.seed})," for event in short]
    return "\n".join(
        [
            "from tests.simulation.simulated_cluster import replay",
            "",
            "",
            f"def test_seed_{seed}() -> None:",
            f"    # {len(short)} of {len(events)} events; {' '.join(str(error).split())}",
            "    events = [",
            *lines,
            "    ]",
            f"    replay({seed}, events)",
            "",
        ]
    ).replace("'", '"')
