"""The page of metrics, read as Prometheus reads it."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import FakeWorker, script_of
from moestro.cache import LinkStats, TierStats
from moestro.engine import EngineState, FinishReason, TokenEvent

URL = "/v1/completions"

FAMILIES = {
    "engine_up": "gauge",
    "engine_heartbeat_age_seconds": "gauge",
    "engine_steps": "counter",
    "build_info": "gauge",
    "model_info": "gauge",
    "model_load_seconds": "gauge",
    "requests_running": "gauge",
    "requests_waiting": "gauge",
    "requests": "counter",
    "admission_rejections": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "kv_cache_usage_ratio": "gauge",
    "kv_cache_capacity_bytes": "gauge",
    "corrupted_requests": "counter",
    "expert_lookups": "counter",
    "expert_host_lookups": "counter",
    "expert_host_evictions": "counter",
    "expert_link_copies": "counter",
    "expert_evictions": "counter",
    "expert_host_computed": "counter",
    "expert_prefetches": "counter",
    "expert_loads": "counter",
    "prefetch_on": "gauge",
    "prefetch_pauses": "counter",
    "prefetch_guesses": "counter",
    "prefetch_guesses_right": "counter",
    "prefetch_asked": "counter",
    "prefetch_account_seconds": "counter",
    "prefetch_rereads": "counter",
    "sequence_experts_requests": "counter",
    "sequence_experts_kept": "counter",
    "sequence_experts_offered": "counter",
    "sequence_neuron_copies_bytes": "gauge",
    "expert_transfer_bytes": "counter",
    "expert_transfer_seconds": "counter",
    "expert_stall_seconds": "counter",
    "expert_cache_capacity_bytes": "gauge",
    "expert_cache_used_bytes": "gauge",
    "expert_cache_slots": "gauge",
    "expert_blob_bytes": "gauge",
    "memory_planned_bytes": "gauge",
}


async def page_of(client) -> dict[str, float]:
    """Sample name with its labels -> value."""
    text = (await client.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


async def test_all_families_are_there_from_the_start(client):
    text = (await client.get("/metrics")).text
    types = {
        family.name.removeprefix("moestro_"): family.type
        for family in text_string_to_metric_families(text)
        if family.name.startswith("moestro_")
    }
    assert types == FAMILIES
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text


async def test_zero_series_are_exported(client):
    page = await page_of(client)
    for reason in ("stop", "length", "abort", "error", "rejected"):
        name = f"moestro_requests_total{{endpoint=completions,finish_reason={reason}}}"
        assert page[name] == 0
    for reason in ("queue_full", "draining", "loading", "engine_failed", "body_too_large"):
        assert page[f"moestro_admission_rejections_total{{reason={reason}}}"] == 0


async def test_a_request_is_observed(client):
    await client.post(URL, json={"prompt": "Gravity is"})
    page = await page_of(client)
    assert page["moestro_requests_total{endpoint=completions,finish_reason=stop}"] == 1
    assert page["moestro_time_to_first_token_seconds_count{}"] == 1
    assert page["moestro_inter_token_latency_seconds_count{}"] == 2
    assert page["moestro_e2e_request_latency_seconds_count{}"] == 1
    assert page["moestro_request_queue_time_seconds_sum{}"] == 0.25
    assert page["moestro_request_prefill_time_seconds_sum{}"] == 0.5
    assert page["moestro_request_decode_time_seconds_sum{}"] == 1.0
    assert page["moestro_request_prompt_tokens_sum{}"] == 10
    assert page["moestro_request_generation_tokens_sum{}"] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_failures_and_refusals_are_counted_apart(client, worker, stream):
    worker.script = script_of(TokenEvent("", (), FinishReason.ERROR, error="no"))
    await client.post(URL, json={"prompt": "x", "stream": stream})
    await client.post(URL, json={"prompt": "", "stream": stream})
    worker.state = EngineState.DRAINING
    await client.post(URL, json={"prompt": "x", "stream": stream})
    page = await page_of(client)
    assert page["moestro_requests_total{endpoint=completions,finish_reason=error}"] == 1
    assert page["moestro_requests_total{endpoint=completions,finish_reason=rejected}"] == 2
    assert page["moestro_admission_rejections_total{reason=draining}"] == 1
    assert page["moestro_e2e_request_latency_seconds_count{}"] == 0


async def test_engine_dying_under_a_request_is_counted_once(client, worker):
    from moestro.engine import EngineFailed

    worker.script = script_of(EngineFailed("gone"))
    await client.post(URL, json={"prompt": "x"})
    page = await page_of(client)
    reasons = ("stop", "length", "abort", "error", "rejected")
    names = [f"moestro_requests_total{{endpoint=completions,finish_reason={r}}}" for r in reasons]
    assert [page[name] for name in names] == [0, 0, 0, 1, 0]


async def test_labels_come_from_fixed_sets(client):
    before = set(await page_of(client))
    for path in ("/a", "/b", "/v1/completions/x"):
        await client.request("BREW", path)
    await client.post(URL, json={"prompt": "x", "model": "m1"}, headers={"x-request-id": "r"})
    assert set(await page_of(client)) == before


async def test_apps_do_not_share_numbers(client_for, worker: FakeWorker):
    one, other = client_for(), client_for()
    await one.post(URL, json={"prompt": "x"})
    name = "moestro_requests_total{endpoint=completions,finish_reason=stop}"
    assert ((await page_of(one))[name], (await page_of(other))[name]) == (1, 0)


LINK = LinkStats(
    "emulated 12 GB/s, 20 us", True, copies=11, copied_bytes=11000, chunks=12, busy_s=3
)
HOST = TierStats(
    mode="exclusive",
    hits=7,
    misses=4,
    evictions=2,
    demand_reads=3,
    prefetch_reads=1,
    demand_bytes=3000,
    prefetch_bytes=1000,
    demand_read_s=0.75,
    prefetch_read_s=0.5,
    slots=5,
    slots_used=4,
    slot_bytes=1000,
    capacity_bytes=5000,
    used_bytes=4000,
    link=LINK,
)


async def test_a_host_tier_and_its_link_have_their_own_labels(client, worker):
    cache = replace(worker.stats_now.cache, host=HOST)
    worker.stats_now = replace(worker.stats_now, cache=cache)
    page = await page_of(client)
    for name, value in {
        "expert_host_lookups_total{result=hit}": 7,
        "expert_host_lookups_total{result=miss}": 4,
        "expert_host_evictions_total{mode=exclusive}": 2,
        "expert_link_copies_total{link=emulated link}": 11,
        "expert_transfer_bytes_total{cause=demand,source=emulated link}": 6000,
        "expert_transfer_bytes_total{cause=demand,source=disk}": 3000,
        "expert_transfer_seconds_total{cause=prefetch,source=disk}": 0.5,
        "expert_cache_slots{tier=emulated device}": 8,
        "expert_cache_slots{tier=host}": 5,
        "expert_cache_used_bytes{tier=host}": 4000,
    }.items():
        assert page[f"moestro_{name}"] == value


async def test_without_a_host_tier_it_has_no_samples(client):
    page = await page_of(client)
    assert not [name for name in page if "expert_host" in name or "expert_link" in name]
    assert page["moestro_expert_cache_slots{tier=host}"] == 8
