"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unmask.serve.answers import Usage
from unmask.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "unmask_requests", "Answers by path and status.", ["path", "status"], registry=self.registry
        )
        self.tokens = Counter("unmask_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.forwards = Counter(
            "unmask_forwards", "Forwards that rows needed, by mode.", ["mode"], registry=self.registry
        )
        self.cancelled = Counter("unmask_cancelled", "Requests whose client went away.", registry=self.registry)
        self.seconds = Histogram(
            "unmask_request_seconds", "Until the whole answer.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "unmask_first_piece_seconds", "Until the first piece of a stream.", buckets=_SECONDS, registry=self.registry
        )
        waiting = Gauge("unmask_rows_waiting", "Rows that wait for their turn.", registry=self.registry)
        waiting.set_function(lambda: engine.num_waiting)
        running = Gauge("unmask_rows_running", "Rows that decode.", registry=self.registry)
        running.set_function(lambda: engine.num_running)

    def count(self, usage: Usage) -> None:
        """Add what an answer used."""
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("new").inc(usage.completion_tokens)
        if usage.unmask is not None:
            self.forwards.labels(usage.unmask.mode or "").inc(usage.unmask.num_forwards)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
