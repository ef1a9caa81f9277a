"""The engine's counters as Prometheus families, asked for when the page is scraped."""

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moestro.engine import (
    CacheStats,
    EngineState,
    EngineStats,
    ModelInfo,
    TierStats,
    Unavailable,
)
from moestro.server.contract import Worker

PREFIX = "moestro"
UP = (EngineState.READY, EngineState.DRAINING)

Labelled = dict[tuple[str, ...], float]


class EngineCollector(Collector):
    """While the engine loads, or when it is gone, only what can still be said.

    The numbers are the engine's last: a step can take minutes, and nobody waits for its end.
    """

    def __init__(self, worker: Worker, served_name: str) -> None:
        self._worker = worker
        self._served_name = served_name

    def collect(self) -> Iterator[Metric]:
        worker = self._worker
        yield _gauge("engine_up", "1 when requests are served", float(worker.state in UP))
        words = "Since the engine's loop last turned; its other numbers are at most as old"
        yield _gauge("engine_heartbeat_age_seconds", words, worker.heartbeat_age_s)
        yield _gauge("build_info", "Version", {(version("moestro"),): 1}, ("version",))
        if worker.state not in UP:
            return
        try:
            model, stats = worker.model, worker.last_stats
        except Unavailable:
            return
        yield from _of_model(self._served_name, model, stats)
        yield from _of_requests(stats)
        yield from _of_lookups(stats)
        yield from _of_transfers(stats)
        yield from _of_host_tier(stats)
        yield from _of_prefetch(stats)
        yield from _of_selection(stats)
        yield from _of_memory(stats)


def _of_model(served_name: str, model: ModelInfo, stats: EngineStats) -> Iterator[Metric]:
    facts = {
        "model_name": served_name,
        "family": model.family,
        "layers": str(model.num_layers),
        "moe_layers": str(model.moe_layers),
        "experts": str(model.num_experts),
        "experts_per_token": str(model.experts_per_token),
        "expert_format": model.expert_format,
        "max_model_len": str(model.max_model_len_tokens),
    }
    yield _gauge("model_info", "What is served", {tuple(facts.values()): 1}, tuple(facts))
    phases: Labelled = {(phase,): seconds for phase, seconds in stats.load_s.items()}
    yield _gauge("model_load_seconds", "Duration of the start by phase", phases, ("phase",))


def _of_requests(stats: EngineStats) -> Iterator[Metric]:
    capacity_bytes = stats.kv_capacity_bytes
    usage = stats.kv_used_bytes / capacity_bytes if capacity_bytes else 0.0
    yield _gauge("requests_running", "Requests in the batch", stats.requests_running)
    yield _gauge("requests_waiting", "Requests in the queue", stats.requests_waiting)
    yield _gauge("kv_cache_usage_ratio", "Used share of the KV cache, 0 to 1", usage)
    yield _gauge("kv_cache_capacity_bytes", "Size of the KV cache", capacity_bytes)
    yield _counter("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
    yield _counter("generation_tokens", "Tokens generated", stats.generation_tokens)
    steps: Labelled = {("prefill",): stats.prefill_steps, ("decode",): stats.decode_steps}
    yield _counter("engine_steps", "Passes of the model", steps, ("phase",))
    yield _counter(
        "corrupted_requests", "Requests ended by logits not finite", stats.corrupted_requests
    )


def _of_lookups(stats: EngineStats) -> Iterator[Metric]:
    layers = stats.cache.layers
    lookups: Labelled = {}
    evictions: Labelled = {}
    computed_below: Labelled = {}  # none without a tier below the slots
    for label, layer in zip(layer_labels([layer.name for layer in layers]), layers, strict=True):
        lookups[label, "hit"] = layer.hits
        lookups[label, "prefetch_hit"] = layer.prefetch_hits
        lookups[label, "miss"] = layer.misses
        evictions[(label,)] = layer.evictions
        if stats.cache.host is not None:
            computed_below[(label,)] = layer.computed_below
    words = "Distinct experts asked for, per layer and step"
    yield _counter("expert_lookups", words, lookups, ("layer", "result"))
    yield _counter("expert_evictions", "Experts that made room for others", evictions, ("layer",))
    what = "Misses computed on the host, where they lay"
    yield _counter("expert_host_computed", what, computed_below, ("layer",))


def _of_transfers(stats: EngineStats) -> Iterator[Metric]:
    cache = stats.cache
    outcomes: Labelled = {
        ("used",): cache.prefetches_used,
        ("late",): cache.prefetches_late,
        ("wasted",): cache.prefetches_wasted,
        ("dropped",): cache.prefetches_dropped,
    }
    loads: Labelled = {("demand",): cache.demand_loads, ("prefetch",): cache.prefetch_loads}
    moved: Labelled = {}
    seconds: Labelled = {}
    link = "disk" if cache.host is None else _link_label(cache.host)
    for source, part in ((link, cache), ("disk", cache.host)):
        if part is not None:
            moved[source, "demand"] = part.demand_bytes
            moved[source, "prefetch"] = part.prefetch_bytes
            seconds[source, "demand"] = part.demand_read_s
            seconds[source, "prefetch"] = part.prefetch_read_s
    stalls: Labelled = {("prefill",): cache.prefill_stall_s, ("decode",): cache.decode_stall_s}
    way = ("source", "cause")
    yield _counter("expert_prefetches", "Guessed experts by outcome", outcomes, ("outcome",))
    yield _counter("expert_loads", "Experts read into a slot", loads, ("cause",))
    yield _counter("expert_transfer_bytes", "Bytes of experts moved", moved, way)
    yield _counter("expert_transfer_seconds", "Time of the readers or the link", seconds, way)
    yield _counter("expert_stall_seconds", "Computing waited for experts", stalls, ("phase",))


def _of_host_tier(stats: EngineStats) -> Iterator[Metric]:
    """Without samples where experts are computed from the host's slots."""
    host = stats.cache.host
    lookups: Labelled = {}
    evictions: Labelled = {}
    copies: Labelled = {}
    if host is not None:
        lookups = {("hit",): host.hits, ("miss",): host.misses}
        evictions = {(host.mode,): host.evictions}
        copies = {(_link_label(host),): host.link.copies}
    words = "Experts that the device missed, looked for in host memory"
    yield _counter("expert_host_lookups", words, lookups, ("result",))
    yield _counter("expert_host_evictions", "Experts that left host memory", evictions, ("mode",))
    yield _counter("expert_link_copies", "Experts copied to the device", copies, ("link",))


def _link_label(host: TierStats) -> str:
    return "emulated link" if host.link.emulated else "host"


def _of_prefetch(stats: EngineStats) -> Iterator[Metric]:
    cache, prefetch = stats.cache, stats.prefetch
    guesses: Labelled = {}
    right: Labelled = {}
    asked: Labelled = {}
    labels = layer_labels([layer.name for layer in cache.layers])
    for label, layer in zip(labels, prefetch.layers, strict=False):
        guesses[label, "all"], right[label, "all"] = layer.guessed, layer.right
        guesses[label, "fetch"], right[label, "fetch"] = layer.chosen, layer.chosen_right
        asked[(label,)] = layer.asked
    way = ("layer", "set")
    yield _gauge("prefetch_on", "1 while guesses are made", float(prefetch.on))
    yield _counter("prefetch_pauses", "Times prefetch did not pay and stopped", prefetch.pauses)
    yield _counter("prefetch_guesses", "Experts named for a layer of a decode step", guesses, way)
    yield _counter("prefetch_guesses_right", "Of these, experts then asked for", right, way)
    yield _counter("prefetch_asked", "Experts that guessed layers asked for", asked, ("layer",))
    account: Labelled = {("gain",): prefetch.gain_s, ("cost",): prefetch.cost_s}
    words = "Stall avoided by prefetch, and time lost by it, as it judges itself"
    yield _counter("prefetch_account_seconds", words, account, ("side",))
    words = "Experts read again that had made room for a wrong guess"
    yield _counter("prefetch_rereads", words, cache.prefetch_rereads)


def _of_selection(stats: EngineStats) -> Iterator[Metric]:
    found = stats.selection
    requests: Labelled = {(mode,): count for mode, count in found.requests.items()}
    words = "Prompts computed, by who chooses the experts of their answers"
    yield _counter("sequence_experts_requests", words, requests, ("mode",))
    words = "Experts, over all layers, that prompts kept for their answers"
    yield _counter("sequence_experts_kept", words, found.kept_experts)
    words = "Experts, over all layers, that these prompts chose from"
    yield _counter("sequence_experts_offered", words, found.known_experts)
    words = "Of the KV cache, what running answers hold in copies of the neurons that they keep"
    yield _gauge("sequence_neuron_copies_bytes", words, found.neuron_copies_bytes)


def _of_memory(stats: EngineStats) -> Iterator[Metric]:
    cache = stats.cache
    tier = ("tier",)
    capacity: Labelled = {}
    used: Labelled = {}
    slots: Labelled = {}
    for name, part in _tiers(cache):
        capacity[(name,)] = part.capacity_bytes
        used[(name,)] = part.used_bytes
        slots[(name,)] = part.slots
    yield _gauge("expert_cache_capacity_bytes", "Room for experts", capacity, tier)
    yield _gauge("expert_cache_used_bytes", "Room taken by experts", used, tier)
    yield _gauge("expert_cache_slots", "Experts that fit at once", slots, tier)
    planned: Labelled = {(part,): size for part, size in stats.planned_bytes.items()}
    words = "The memory plan: the process stays below the sum"
    yield _gauge("memory_planned_bytes", words, planned, ("part",))
    yield _gauge("expert_blob_bytes", "One expert, as it is moved", cache.slot_bytes)


def _tiers(cache: CacheStats) -> list[tuple[str, CacheStats | TierStats]]:
    if cache.host is None:
        return [("host", cache)]
    return [
        ("emulated device" if cache.host.link.emulated else "device", cache),
        ("host", cache.host),
    ]


def layer_labels(names: list[str]) -> list[str]:
    """The layer's number out of each module path; positions where that is not one to one."""
    numbers = [found[0] for name in names if (found := re.search(r"\d+", name))]
    if len(set(numbers)) == len(names):
        return numbers
    return [str(position) for position in range(len(names))]


def _gauge(
    name: str, words: str, values: Labelled | float, labels: Iterable[str] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", words, labels=tuple(labels))
    for label_values, value in (values if isinstance(values, dict) else {(): values}).items():
        family.add_metric(label_values, value)
    return family


def _counter(
    name: str, words: str, values: Labelled | float, labels: Iterable[str] = ()
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{PREFIX}_{name}", words, labels=tuple(labels))
    for label_values, value in (values if isinstance(values, dict) else {(): values}).items():
        family.add_metric(label_values, value)
    return family
