"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class _EngineTokens:
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self):
        for name, value, what in (
            ("dmattn_prompt_tokens", self._engine.prompt_tokens, "Prompt tokens read."),
            ("dmattn_generated_tokens", self._engine.generated_tokens, "Tokens generated."),
        ):
            yield CounterMetricFamily(name, what, value=value)


class Metrics:
    """A registry of one server's own: several can live in one process."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineTokens(engine))
        self.requests = Counter(
            "dmattn_requests", "Answers by route and status.", ["route", "status"], registry=self._registry
        )
        self.first_token = Histogram(
            "dmattn_first_token_seconds", "From request to first token.", buckets=SECONDS, registry=self._registry
        )
        self.duration = Histogram(
            "dmattn_request_seconds", "From request to last token.", buckets=SECONDS, registry=self._registry
        )
        running = Gauge("dmattn_requests_running", "Requests in slots.", registry=self._registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("dmattn_requests_waiting", "Requests that wait for a slot.", registry=self._registry)
        waiting.set_function(lambda: engine.waiting)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
