"""GET /metrics: what the server counts, and the engine's own numbers, in Prometheus' text format.

Each app has a registry of its own. The engine's numbers are read when they are asked for.
"""

import time
from collections.abc import Callable, Iterator, Mapping

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from loraserve.lora.spec import BASE, Spec

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class EngineNumbers:
    """A collector over `Service.stats()`: every number becomes `loraserve_engine_<name>`."""

    def __init__(self, stats: Callable[[], Mapping[str, object]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for name, value in self._stats().items():
            if not isinstance(value, int | float):
                continue
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            words = name.removesuffix("_total").replace("_", " ")
            yield family(f"loraserve_engine_{name}", f"The engine's {words}.", value=float(value))


class Meter:
    """Counts one request's tokens and its time to the first one."""

    def __init__(self, metrics: "Metrics", adapter: str) -> None:
        self._tokens = metrics.generation_tokens.labels(adapter)
        self._first = metrics.first_token
        self._start: float | None = time.perf_counter()

    def tokens(self, count: int) -> None:
        if not count:
            return
        if self._start is not None:
            self._first.observe(time.perf_counter() - self._start)
            self._start = None
        self._tokens.inc(count)


class Metrics:
    """The counters of one app."""

    def __init__(self, stats: Callable[[], Mapping[str, object]]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(EngineNumbers(stats))
        self.requests = Counter(
            "loraserve_requests", "Requests by route and status.", ["route", "method", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "loraserve_prompt_tokens", "Prompt tokens by adapter.", ["adapter"], registry=registry
        )
        self.generation_tokens = Counter(
            "loraserve_generation_tokens", "Generated tokens by adapter.", ["adapter"], registry=registry
        )
        self.first_token = Histogram(
            "loraserve_time_to_first_token_seconds",
            "Seconds from a request's admission to its first token.",
            buckets=SECONDS,
            registry=registry,
        )

    def meter(self, spec: Spec, prompt_tokens: int) -> Meter:
        """Begin to count a request that was let in. Blends share one label, so that labels stay as many as adapters."""
        adapter = BASE if not spec else spec[0].name if len(spec) == 1 else "blend"
        self.prompt_tokens.labels(adapter).inc(prompt_tokens)
        return Meter(self, adapter)

    def install(self, app: Flask) -> None:
        """Count every response of `app`."""

        def count(response: Response) -> Response:
            route = request.url_rule.rule if request.url_rule else "unknown"
            method = request.method if request.url_rule else "ANY"
            self.requests.labels(route, method, response.status_code).inc()
            return response

        app.after_request(count)

    def text(self) -> bytes:
        return generate_latest(self.registry)
