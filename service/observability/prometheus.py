"""Prometheus counters and histograms of this process."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric

REQUEST_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LAG_BOUNDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)


class ServiceMetrics:
    """Metrics of one service. Thread-safe.

    ``requests`` has the labels method, route and status. ``lag`` and ``requests`` are in seconds.
    """

    def __init__(self) -> None:
        # Not the library's global registry: it would mix the services of one process, as in the tests.
        registry = self._registry = CollectorRegistry()
        name, help_ = "trainyard_retention_removed_total", "Rows of old jobs that were removed."
        self._removed = Counter(name, help_, ["what"], registry=registry)
        name, help_ = "trainyard_request_seconds", "Duration of requests, without streams and downloads."
        labels = ["method", "route", "status"]
        self.requests = Histogram(name, help_, labels, registry=registry, buckets=REQUEST_BOUNDS)
        name, help_ = "trainyard_ingest_lag_seconds", "Time from writing an outbox line until it is stored."
        self.lag = Histogram(name, help_, registry=registry, buckets=LAG_BOUNDS)

    def rows_removed(self, what: str, rows: int) -> None:
        """Count rows that retention has removed. ``what`` is their kind."""
        self._removed.labels(what).inc(rows)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its current samples."""
        for metric in self._registry.collect():
            # The library adds a gauge with the creation time of each series, which doubles the number of series.
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
