"""The numbers of the request path, and the page on which all numbers are shown.

Observed from token events as they pass; the engine's own counters come from `collector` when the
page is asked for.
"""

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moestro.engine import FinishReason, Timings
from moestro.server.contract import REJECTIONS, Row

PREFIX = "moestro"
ENDPOINTS = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
REASONS = (*(reason.value for reason in FinishReason), "rejected")

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5),
    *(10, 20, 40, 80, 160, 640, 2560),
)
ITL_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960),
    *(1920, 7680),
)
TOKEN_BUCKETS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))


class ServerMetrics:
    """One registry per application. Observing is cheap and safe in any thread."""

    def __init__(self, engine: Collector) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(engine)
        ProcessCollector(registry=self._registry)
        self._requests = self._counter(
            "requests", "Requests by how they ended", ("endpoint", "finish_reason")
        )
        self._rejections = self._counter(
            "admission_rejections", "Requests turned away by the server's state", ("reason",)
        )
        for endpoint in ENDPOINTS.values():
            for reason in REASONS:
                self._requests.labels(endpoint, reason)
        for reason in REJECTIONS:
            self._rejections.labels(reason)
        self._make_histograms()

    def _make_histograms(self) -> None:
        seconds = self._histogram
        self._ttft = seconds(
            "time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS_S
        )
        self._itl = seconds(
            "inter_token_latency_seconds", "Between two tokens of a request", ITL_BUCKETS_S
        )
        self._e2e = seconds(
            "e2e_request_latency_seconds", "Arrival to end, finished requests", REQUEST_BUCKETS_S
        )
        self._queue = seconds(
            "request_queue_time_seconds", "Waiting before the first pass", REQUEST_BUCKETS_S
        )
        self._prefill = seconds(
            "request_prefill_time_seconds", "First pass to first token", REQUEST_BUCKETS_S
        )
        self._decode = seconds(
            "request_decode_time_seconds", "First token to last", REQUEST_BUCKETS_S
        )
        self._prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of finished requests", TOKEN_BUCKETS
        )
        self._generated = self._histogram(
            "request_generation_tokens", "Generated tokens of finished requests", TOKEN_BUCKETS
        )

    def _counter(self, name: str, words: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"{PREFIX}_{name}", words, labels, registry=self._registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", words, buckets=buckets, registry=self._registry)

    def refused(self, path: str, row: Row) -> None:
        """A request that the engine never saw."""
        if row.rejection is not None:
            self._rejections.labels(row.rejection).inc()
        if path in ENDPOINTS:
            reason = FinishReason.ERROR.value if row.status == 500 else "rejected"
            self._requests.labels(ENDPOINTS[path], reason).inc()

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._itl.observe(seconds)

    def ended(self, endpoint: str, reason: FinishReason) -> None:
        self._requests.labels(endpoint, reason.value).inc()

    def finished(
        self, total_s: float, prompt_tokens: int, generated_tokens: int, timings: Timings | None
    ) -> None:
        """A request that came to its own end (stop or length)."""
        self._e2e.observe(total_s)
        self._prompt.observe(prompt_tokens)
        self._generated.observe(generated_tokens)
        if timings is not None:
            self._queue.observe(timings.queue_s)
            self._prefill.observe(timings.prefill_s)
            self._decode.observe(timings.decode_s)

    def text(self) -> bytes:
        """The page, with the engine's last snapshot."""
        return generate_latest(_WithoutCreated(self._registry))


class _WithoutCreated(CollectorRegistry):
    """A view of a registry without `_created` samples, which double the page for nothing.

    The client's own switch for this is global to the process.
    """

    def __init__(self, inner: CollectorRegistry) -> None:
        super().__init__()
        self._inner = inner

    def collect(self) -> Iterable[Metric]:
        for metric in self._inner.collect():
            metric.samples = [
                sample for sample in metric.samples if not sample.name.endswith("_created")
            ]
            yield metric
