"""What this process counts of its own work, for Prometheus. Lost with the process, as counters are."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric

REQUEST_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LAG_BOUNDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)


class ServiceMetrics:
    """The counter and the histograms of one service. Thread-safe.

    ``requests`` has the labels method, route and status; ``lag`` and ``requests`` are in seconds.
    """

    def __init__(self) -> None:
        # A registry of its own: the library's global one would mix the services of one process, as in the tests.
        own = self._registry = CollectorRegistry()
        name, explained = "trainyard_retention_removed_total", "Rows of old jobs that were removed."
        self._removed = Counter(name, explained, ["what"], registry=own)
        name, explained = "trainyard_request_seconds", "Time to answer a request; streams and downloads are left out."
        self.requests = Histogram(name, explained, ["method", "route", "status"], registry=own, buckets=REQUEST_BOUNDS)
        name, explained = "trainyard_ingest_lag_seconds", "From the writing of an outbox line to its being stored."
        self.lag = Histogram(name, explained, registry=own, buckets=LAG_BOUNDS)

    def rows_removed(self, what: str, rows: int) -> None:
        """Count rows that retention removed; ``what`` is their kind."""
        self._removed.labels(what).inc(rows)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its samples of now."""
        for metric in self._registry.collect():
            # The library adds the time at which each series began, as a gauge of its own: twice the series, no use.
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
