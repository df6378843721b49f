"""What Prometheus is told.  Each service has a registry of its own, so that two in one process do not add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)


class Telemetry:
    """Counters, histograms and gauges of a service."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ImportError(
                f'Metrics need the client of Prometheus: pip install "unbraid[serve]" ({error}).'
            ) from error
        self._text = prometheus.generate_latest
        self.registry = prometheus.CollectorRegistry()

        def made(kind: Any, name: str, text: str, labels: Sequence[str] = (), **options: Any) -> Any:
            return kind(f"unbraid_{name}", text, labels, registry=self.registry, **options)

        counter, histogram, gauge = (
            partial(made, getattr(prometheus, kind)) for kind in ("Counter", "Histogram", "Gauge")
        )
        self.requests = counter("requests", "Requests by route and status.", ("route", "status"))
        self.request_seconds = histogram("request_seconds", "From the head to the answer.", ("route",), buckets=FAST)
        self.stage_seconds = histogram("stage_seconds", "Stages of a request.", ("stage",), buckets=FAST)
        self.batch_requests = histogram("batch_requests", "Requests computed together.", buckets=SIZES)
        self.batch_rows = histogram("batch_rows", "Rows computed together.", buckets=SIZES)
        self.in_flight = gauge("in_flight", "Requests that are worked on or wait for it.")
        self.queue = gauge("queue", "Small requests that wait for a batch.")
        self.events = counter("events", "Events received.", ("result",))
        self.degraded = counter("degraded", "Answers of /rank without histories.")
        self.store_errors = counter("store_errors", "What the store failed with.", ("kind",))
        self.cache_hits = gauge("cache_hits", "Of the users' cache since the bundle was loaded.")
        self.cache_misses = gauge("cache_misses", "Of the users' cache since the bundle was loaded.")
        self.cache_bytes = gauge("cache_bytes", "Of the users' cache.")
        self.reloads = counter("reloads", "Bundles offered.", ("result",))
        self.bundle = gauge("bundle", "1: the bundle that answers.", ("name", "fingerprint"))

    def now(self, gauge: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when it is read."""
        getattr(self, gauge).set_function(value)

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Observe the seconds of stages."""
        for stage, value in seconds.items():
            self.stage_seconds.labels(stage).observe(value)

    def loaded(self, name: str, fingerprint: str) -> None:
        """Say which bundle answers."""
        self.bundle.clear()
        self.bundle.labels(name, fingerprint).set(1)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return self._text(self.registry)
