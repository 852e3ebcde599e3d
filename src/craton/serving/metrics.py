"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """One server's counters, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ("endpoint", "model")
        self.requests = Counter("craton_requests", "Requests answered", (*labels, "status"), registry=registry)
        self.seconds = Histogram(
            "craton_request_seconds", "Time of a request, waiting included", labels, registry=registry, buckets=_SECONDS
        )
        self.first_token = Histogram(
            "craton_first_token_seconds", "Time to an answer's first token", labels, registry=registry, buckets=_SECONDS
        )
        self.between_tokens = Histogram(
            "craton_between_tokens_seconds", "Time between tokens", labels, registry=registry, buckets=_STEP_SECONDS
        )
        self.prompt_tokens = Counter("craton_prompt_tokens", "Tokens of prompts", ("model",), registry=registry)
        self.cached_tokens = Counter(
            "craton_cached_prompt_tokens", "Tokens of prompts found in the cache", ("model",), registry=registry
        )
        self.completion_tokens = Counter("craton_completion_tokens", "Tokens written", ("model",), registry=registry)
        self.disconnects = Counter("craton_disconnects", "Clients that left before their answer", registry=registry)
        self.running = Gauge("craton_answers_running", "Answers being written", registry=registry)
        self.active = Gauge("craton_requests_running", "Requests being answered", registry=registry)
        self.waiting = Gauge("craton_requests_waiting", "Requests in the queue", registry=registry)

    def text(self) -> bytes:
        """Prometheus' text form."""
        return generate_latest(self._registry)
