"""One request's account."""

from fake_engine import FakeWorker
from moestro.engine import FinishReason, TokenEvent
from moestro.server.metrics.collector import EngineCollector
from moestro.server.metrics.families import ServerMetrics
from moestro.server.metrics.track import Track


def page(metrics: ServerMetrics) -> str:
    return metrics.text().decode()


def test_closing_twice_counts_once_and_an_unfinished_request_was_aborted():
    metrics = ServerMetrics(EngineCollector(FakeWorker(), "demo"))
    track = Track(metrics, "completions", "r", 0.0)
    track.saw(TokenEvent("a", (1,)))
    track.close()
    track.close()
    line = 'moestro_requests_total{endpoint="completions",finish_reason="abort"} 1.0'
    assert line in page(metrics)
    assert "moestro_e2e_request_latency_seconds_count 0.0" in page(metrics)


def test_events_without_tokens_are_no_tokens():
    metrics = ServerMetrics(EngineCollector(FakeWorker(), "demo"))
    track = Track(metrics, "completions", "r", 0.0)
    track.saw(TokenEvent("a", ()))
    track.saw(TokenEvent("b", (1, 2), FinishReason.LENGTH))
    track.prompt_tokens = 3
    assert track.prompt_tokens + track.generated_tokens == 5
    assert "moestro_time_to_first_token_seconds_count 1.0" in page(metrics)
    assert "moestro_inter_token_latency_seconds_count 0.0" in page(metrics)
