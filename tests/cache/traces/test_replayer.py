"""A replay counts what the live cache counted, and nobody beats the one who knows the future."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manual_reader import ManualReader
from moestro.cache import (
    DecayedFrequency,
    ExpertCache,
    ExpertKey,
    LayerReplay,
    Lru,
    NextUse,
    Pack,
    PerLayer,
    Phase,
    Policy,
    Routed,
    TraceEvent,
    TraceReader,
    TraceWriter,
    belady,
    plan_slots,
    replay,
)
from tiny_packs import build_tiny, tiny_spec

LAYERS, EXPERTS = 3, 6
PER_LAYER = [EXPERTS] * LAYERS
DECODE, PREFILL = Phase.DECODE, Phase.PREFILL

POLICIES: list[Callable[[], Policy]] = [Lru, DecayedFrequency, NextUse, lambda: PerLayer(Lru)]

Asked = list[tuple[int, list[int], Phase]]
COUNTS = st.lists(st.integers(1, 40), min_size=EXPERTS, max_size=EXPERTS)  # of a prompt's tokens
ASKED = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), unique=True),
        st.sampled_from(Phase),
    ),
    max_size=40,
)


def as_events(asked: Sequence[tuple[int, list[int], Phase]]) -> list[TraceEvent]:
    return [
        TraceEvent(step, phase, layer, tuple(experts))
        for step, (layer, experts, phase) in enumerate(asked)
    ]


def circle(steps: int, union: int, phase: Phase = DECODE) -> Asked:
    """Every layer once a step, in order, with the same experts each time."""
    return [(layer, list(range(union)), phase) for _ in range(steps) for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    pack = build_tiny(tmp_path_factory.mktemp("replay") / "tiny.pack", tiny_spec(*PER_LAYER))
    yield pack
    pack.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    asked=ASKED,
    slots=st.integers(1, LAYERS * EXPERTS),
    policy=st.sampled_from(POLICIES),
    last_first=st.booleans(),
    counts=st.none() | COUNTS,
)
@example(circle(3, 6, PREFILL), 4, Lru, True, None)
@example([*circle(3, 3), *circle(3, 6, PREFILL)], 7, NextUse, True, [1, 40, 1, 40, 20, 1])
def test_replayed_hits_are_live_hits(
    shared: Pack,
    tmp_path_factory: pytest.TempPathFactory,
    asked: Asked,
    slots: int,
    policy: Callable[[], Policy],
    last_first: bool,
    counts: list[int] | None,
) -> None:
    """Whatever the order in which reads end, and for events larger than the cache, too."""

    def routed(experts: list[int], phase: Phase) -> Routed | None:
        if counts is None or phase is DECODE:
            return None
        return Routed(40, tuple(counts[expert] for expert in experts))

    path = tmp_path_factory.getbasetemp() / "live.trace"
    reader = ManualReader(shared, lambda count: count - 1 if last_first else 0)
    plan = plan_slots(slots * shared.spec.slot_bytes, shared.spec, 1)
    live = ExpertCache(shared, plan, policy=policy(), reader=reader)
    with TraceWriter(path, shared.spec) as writer:
        live.record(writer)
        for layer, experts, phase in asked:
            with live.acquire(layer, experts, phase, routed(experts, phase)) as lease:
                assert sorted(expert for expert, _ in lease) == sorted(experts)
            live.check()
    trace, stats = TraceReader(path), live.stats()
    replayed = replay(trace, trace.header.experts_per_layer, slots, policy())
    assert list(replayed.layers) == [LayerReplay(x.hits, x.misses) for x in stats.layers]
    assert sum(layer.loads for layer in replayed.layers) == stats.demand_loads
    strides = [layer.stride_bytes for layer in trace.header.layers]
    assert replayed.loaded_bytes(strides) == stats.loaded_bytes


@given(asked=ASKED, slots=st.integers(1, LAYERS * EXPERTS))
def test_nobody_beats_belady(asked: Asked, slots: int) -> None:
    events = as_events(asked)
    ceiling = hits(belady(events, PER_LAYER, slots).layers)
    for make in POLICIES:
        assert hits(replay(events, PER_LAYER, slots, make()).layers) <= ceiling


def hits(layers: Sequence[LayerReplay]) -> int:
    return sum(layer.hits for layer in layers)


@given(
    asked=st.lists(
        st.tuples(
            st.integers(0, 1), st.lists(st.integers(0, 1), unique=True), st.sampled_from(Phase)
        ),
        max_size=8,
    ),
    slots=st.integers(1, 3),
)
def test_belady_is_the_best_of_all_choices(asked: Asked, slots: int) -> None:
    events = as_events(asked)
    assert hits(belady(events, [2, 2], slots).layers) == best_by_trying(events, slots)


def best_by_trying(events: Sequence[TraceEvent], slots: int) -> int:
    @cache
    def best(number: int, kept: frozenset[ExpertKey]) -> int:
        if number == len(events):
            return 0
        keys = {ExpertKey(events[number].layer, expert) for expert in events[number].experts}
        known = sorted(kept | keys)
        following = (
            frozenset(choice)
            for size in range(min(slots, len(known)) + 1)
            for choice in combinations(known, size)
        )
        return len(kept & keys) + max(best(number + 1, each) for each in following)

    return best(0, frozenset())


def test_a_circle_longer_than_the_cache() -> None:
    """Nine experts in turn, six slots: least recently used always lacks what comes next."""
    events = as_events(circle(10, 3))
    assert replay(events, PER_LAYER, 6, Lru()).hit_rate(DECODE) == 0
    assert replay(events, PER_LAYER, 6, NextUse()).hit_rate(DECODE) >= 0.3
    assert belady(events, PER_LAYER, 6).hit_rate(DECODE) == pytest.approx(0.9 * 6 / 9)


@pytest.mark.parametrize("make", POLICIES)
def test_a_long_prompt_leaves_decoding_its_hits(make: Callable[[], Policy]) -> None:
    """What decoding lives on is there after eight chunks that ask for everything."""
    slots, hot = 16, 4
    before = circle(5, hot)
    events = as_events([*before, *circle(8, EXPERTS, PREFILL), *circle(1, hot)])
    whole = replay(events, PER_LAYER, slots, make())
    without = replay(as_events(before), PER_LAYER, slots, make())
    again = hits(whole.decode) - hits(without.decode)
    assert again >= LAYERS * hot - 2  # all but the slots that prompts may pass through
    assert whole.hit_rate(PREFILL) >= 0.5  # and the prompt uses what is there


def test_what_a_prompt_asked_for_most_is_there_for_its_answer() -> None:
    """Others' experts fill the cache; the answer asks for what the prompt preferred."""
    slots, answer = 8, [4, 5]
    before = as_events(circle(6, 2) + circle(6, 4))
    counts = Routed(32, tuple(32 if expert in answer else 4 for expert in range(EXPERTS)))
    found = {}
    for routed in (None, counts):
        prompt = [
            TraceEvent(20, PREFILL, layer, tuple(range(EXPERTS)), routed) for layer in range(LAYERS)
        ]
        after = [TraceEvent(21, DECODE, layer, tuple(answer)) for layer in range(LAYERS)]
        whole = replay([*before, *prompt, *after], PER_LAYER, slots, NextUse())
        found[routed] = hits(whole.decode) - hits(
            replay(before, PER_LAYER, slots, NextUse()).decode
        )
    assert found[counts] > found[None]


def test_rates_of_nothing_are_zero() -> None:
    replayed = replay([], PER_LAYER, 4, Lru())
    assert replayed.hit_rate(DECODE) == replayed.hit_rate(PREFILL) == 0
    assert replayed.loaded_bytes([1, 1, 1]) == 0
    assert replayed.slots == 4
