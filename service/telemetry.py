"""What this process counts of its own work, as Prometheus text. Thread-safe; lost with the process, as counters are."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

REQUEST_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LAG_BOUNDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)

Labels = tuple[tuple[str, str], ...]


@dataclass
class _Series:
    buckets: list[int]
    total: float = 0.0


@dataclass
class Histogram:
    """How often values fell below each of ``bounds``, by labels."""

    name: str
    explained: str
    bounds: Sequence[float]
    _series: dict[Labels, _Series] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Count one value."""
        with self._lock:
            series = self._series.setdefault(labels, _Series([0] * (len(self.bounds) + 1)))
            series.buckets[bisect_left(self.bounds, value)] += 1
            series.total += value

    def lines(self) -> Iterator[str]:
        """In the text format."""
        yield from head(self.name, "histogram", self.explained)
        with self._lock:
            found = [(labels, list(s.buckets), s.total) for labels, s in self._series.items()]
        for labels, buckets, total in sorted(found):
            count = 0
            for bound, inside in zip((*self.bounds, "+Inf"), buckets, strict=True):
                count += inside
                yield sample(f"{self.name}_bucket", count, (*labels, ("le", str(bound))))
            yield sample(f"{self.name}_sum", total, labels)
            yield sample(f"{self.name}_count", count, labels)


@dataclass
class Telemetry:
    """The histograms of one service."""

    requests: Histogram = field(
        default_factory=lambda: Histogram(
            "trainyard_request_seconds", "Time to answer a request; streams and downloads are left out.", REQUEST_BOUNDS
        )
    )
    lag: Histogram = field(
        default_factory=lambda: Histogram(
            "trainyard_ingest_lag_seconds", "From the writing of an outbox line to its being stored.", LAG_BOUNDS
        )
    )

    removed: Counter[str] = field(default_factory=Counter)
    """Rows that retention took, by what they were."""

    def removes(self, what: str, rows: int) -> None:
        """Retention took so many."""
        self.removed[what] += rows

    def lines(self) -> Iterator[str]:
        """All of them."""
        taken = [((("what", what),), count) for what, count in sorted(self.removed.items())]
        yield from counter("trainyard_retention_removed_total", "Rows of old jobs that were removed.", taken)
        yield from self.requests.lines()
        yield from self.lag.lines()


def head(name: str, kind: str, explained: str) -> Iterator[str]:
    """What stands before the samples of a metric."""
    yield f"# HELP {name} {explained}"
    yield f"# TYPE {name} {kind}"


def sample(name: str, value: float, labels: Labels = ()) -> str:
    """One line. Label values are ours: ids, statuses, routes, names of disks."""
    inside = ",".join(f'{key}="{text}"' for key, text in labels)
    return f"{name}{{{inside}}} {value:.17g}" if inside else f"{name} {value:.17g}"


def gauge(name: str, explained: str, values: Sequence[tuple[Labels, float]]) -> list[str]:
    """A whole metric whose values may go down."""
    return [*head(name, "gauge", explained), *(sample(name, value, labels) for labels, value in values)]


def counter(name: str, explained: str, values: Sequence[tuple[Labels, float]]) -> list[str]:
    """A whole metric whose values only grow."""
    return [*head(name, "counter", explained), *(sample(name, value, labels) for labels, value in values)]
