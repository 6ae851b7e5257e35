"""What /metrics tells, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from receptance.server.models import Models

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one server."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "receptance_requests",
            "Requests by endpoint and status",
            ["endpoint", "status"],
            **given,
        )
        self.in_flight = Gauge(
            "receptance_requests_in_flight", "Requests that are being answered", **given
        )
        self._first = Histogram(
            "receptance_time_to_first_token_seconds",
            "Time from a request to its first token",
            buckets=_SECONDS,
            **given,
        )
        self._gap = Histogram(
            "receptance_time_between_tokens_seconds",
            "Time between two tokens of an answer",
            buckets=_SECONDS,
            **given,
        )
        self._registry.register(_Engines(models))

    def observe(self, what: str, seconds: float) -> None:
        """Note how long something took (see `Served.observe`)."""
        (self._first if what == "first" else self._gap).observe(seconds)

    def answered(self, endpoint: str, status: int) -> None:
        """Note the status of an answer."""
        self._requests.labels(endpoint, status).inc()

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """What engines, queues and caches know of themselves."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering asks for no values."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The values of all models that are loaded."""
        gauges = {
            "waiting_requests": "Prompts that wait for their turn",
            "active_requests": "Prompts that are being read or continued",
            "slots_used": "Texts in the slots of the engine",
            "cache_bytes": "Memory of cached states and their texts",
            "cache_states": "States in memory",
        }
        counters = {
            "prompt_tokens": "Tokens of prompts",
            "cached_tokens": "Tokens of prompts that came from the cache",
            "generated_tokens": "Tokens that were generated",
            "cache_evictions": "States that had no room in memory",
        }
        families = {
            name: GaugeMetricFamily(f"receptance_{name}", text, labels=["model"])
            for name, text in gauges.items()
        } | {
            name: CounterMetricFamily(f"receptance_{name}", text, labels=["model"])
            for name, text in counters.items()
        }
        outcomes = CounterMetricFamily(
            "receptance_cache_lookups",
            "Prompts by what the cache had for them: a hit, or the reason for a miss",
            labels=["model", "outcome"],
        )
        for served in self._models.loaded():
            scheduler, cache = served.scheduler, served.scheduler.cache
            values = {
                "waiting_requests": served.thread.queued,
                "active_requests": scheduler.active,
                "slots_used": scheduler.rows,
                "cache_bytes": cache.nbytes,
                "cache_states": len(cache),
                "prompt_tokens": scheduler.prompt_tokens,
                "cached_tokens": scheduler.cached_tokens,
                "generated_tokens": scheduler.written_tokens,
                "cache_evictions": cache.evicted,
            }
            for name, value in values.items():
                families[name].add_metric([served.name], value)
            for outcome, count in dict(cache.outcomes).items():
                outcomes.add_metric([served.name, outcome], count)
        yield from families.values()
        yield outcomes
