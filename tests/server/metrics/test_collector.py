"""The engine's numbers as families."""

from dataclasses import replace

import pytest

from fake_engine import STATS, FakeWorker
from moestro.engine import EngineState
from moestro.server.metrics.collector import EngineCollector, layer_labels


def samples_of(worker: FakeWorker) -> dict[tuple[str, ...], float]:
    collector = EngineCollector(worker, "demo")
    return {
        (sample.name.removeprefix("moestro_"), *sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def test_lookups_add_up_to_the_experts_asked_for():
    samples = samples_of(FakeWorker())
    lookups = {key[1:]: value for key, value in samples.items() if key[0] == "expert_lookups_total"}
    assert lookups == {
        ("1", "hit"): 5,
        ("1", "prefetch_hit"): 3,
        ("1", "miss"): 2,
        ("2", "hit"): 7,
        ("2", "prefetch_hit"): 0,
        ("2", "miss"): 4,
    }
    assert sum(lookups.values()) == STATS.cache.lookups


def test_bytes_are_loads_times_a_blob():
    samples = samples_of(FakeWorker())
    for cause in ("demand", "prefetch"):
        moved = samples["expert_transfer_bytes_total", "disk", cause]
        assert moved == samples["expert_loads_total", cause] * samples[("expert_blob_bytes",)]


def test_values():
    samples = samples_of(FakeWorker())
    assert samples[("kv_cache_usage_ratio",)] == 0.25
    assert samples["expert_stall_seconds_total", "prefill"] == 0.125
    assert samples["expert_prefetches_total", "dropped"] == 2
    assert samples["expert_cache_slots", "host"] == 8
    assert samples["model_load_seconds", "pack"] == 1.5
    assert samples["engine_steps_total", "decode"] == 37
    assert samples[("prefetch_on",)] == samples[("prefetch_pauses_total",)] == 1
    assert samples["prefetch_account_seconds_total", "gain"] == 0.75
    assert samples["prefetch_account_seconds_total", "cost"] == 0.5
    assert samples[("prefetch_rereads_total",)] == 1
    assert samples["sequence_experts_requests_total", "sequence"] == 2
    assert samples["sequence_experts_requests_total", "short_prompt"] == 1
    assert samples[("sequence_experts_kept_total",)] == 16
    assert samples[("sequence_experts_offered_total",)] == 32
    assert samples[("sequence_neuron_copies_bytes",)] == 4096


def test_guesses_are_counted_by_layer():
    samples = samples_of(FakeWorker())
    counted = {
        name: {key[1:]: value for key, value in samples.items() if key[0] == f"prefetch_{name}"}
        for name in ("guesses_total", "guesses_right_total", "asked_total")
    }
    nothing = {("1", "all"): 0, ("1", "fetch"): 0}
    assert counted["guesses_total"] == {**nothing, ("2", "all"): 10, ("2", "fetch"): 4}
    assert counted["guesses_right_total"] == {**nothing, ("2", "all"): 8, ("2", "fetch"): 3}
    assert counted["asked_total"] == {("1",): 0, ("2",): 9}


def test_an_engine_that_never_guesses_has_the_gauge_alone():
    worker = FakeWorker()
    off = replace(STATS.prefetch, on=False, layers=())
    worker.snapshot = replace(STATS, prefetch=off)
    samples = samples_of(worker)
    assert samples[("prefetch_on",)] == 0
    assert not [key for key in samples if key[0].startswith("prefetch_guesses")]


@pytest.mark.parametrize("state", [EngineState.LOADING, EngineState.FAILED, EngineState.STOPPED])
def test_an_engine_that_is_not_up_has_few_numbers(state):
    samples = samples_of(FakeWorker(state=state))
    assert samples[("engine_up",)] == 0
    assert {key[0] for key in samples} == {
        "engine_up",
        "engine_heartbeat_age_seconds",
        "build_info",
    }


def test_a_stuck_engine_keeps_its_last_numbers():
    worker = FakeWorker()
    worker.heartbeat_age_s = 100
    samples = samples_of(worker)
    assert samples[("engine_heartbeat_age_seconds",)] == 100
    assert samples["engine_steps_total", "decode"] == 37


def test_layer_labels():
    assert layer_labels(["model.layers.3.mlp", "model.layers.10.mlp"]) == ["3", "10"]
    assert layer_labels(["a.1.x", "a.1.y"]) == ["0", "1"]
    assert layer_labels(["x", "a.1"]) == ["0", "1"]
    assert layer_labels([]) == []
