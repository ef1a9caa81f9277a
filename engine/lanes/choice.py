"""Which lane a model takes, and what it looks like from its experts: found without weights.

Passes run on the meta device, so they cost no memory and read nothing. They find the order of the
experts modules, the router and the norm in front of each, which layers expand their keys, and how
much attention state a token needs. No table of families; a model that no lane carries is refused
here, before anything is loaded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from moestro.engine.facts import Lane, LaneChoice, ModelRefused
from moestro.engine.model import (
    PackedCache,
    SequenceKV,
    Topology,
    UnknownKeyword,
    install,
)

from .lane import LanePart
from .packed import PackedLane, last_rows, run_packed
from .sequential import kept_numbers, run_one
from .split import split_stateful
from .states import own_cache_class
from .watch import Watch

TRACE_TOKENS = 3
# Of one sequence: as many at first, so many more. Windows and pools of few tokens are full by then.
FIRST_TOKENS, MORE_TOKENS = 32, 64


class _NotThisLane(Exception):
    """Why, in words."""


def choose_lane(packed: PreTrainedModel, sequential: Callable[[], PreTrainedModel]) -> Topology:
    """`packed` has the hooks of the packed lane, `sequential` makes the model for the other one.

    Both on the meta device. Raises ModelRefused where the model needs something that neither lane
    carries.
    """
    kind = packed.config.model_type
    try:
        try:
            return _trace_packed(packed)
        except _NotThisLane as error:
            return _trace_sequential(sequential(), str(error))
    except _NotThisLane as error:
        raise ModelRefused(f"models of type {kind!r} are not carried yet: {error}") from error


def packed_lane(model: PreTrainedModel, topology: Topology, pages: int) -> PackedLane:
    """`model` with its weights, hooks and cache, as it was traced."""
    cache = PackedCache()
    cache.expanded_layers = set(topology.expanded_layers)
    cache.block_masks = topology.block_masks
    install(model, cache)
    stateful = split_stateful(model, cache)
    return PackedLane(model, cache, pages, keeps_states=bool(stateful))


def _trace_packed(model: PreTrainedModel) -> Topology:
    """One pass over a row of two sequences, and another one where the model reads its masks."""
    if own := own_cache_class(model):
        raise _NotThisLane(f"it keeps its state in a class of its own ({own})")
    cache = PackedCache()
    install(model, cache)
    split_stateful(model, cache)
    try:
        return _trace_row(model, cache)
    except _NotThisLane:
        cache.block_masks = True
        return _trace_row(model, cache)


def _trace_row(model: PreTrainedModel, cache: PackedCache) -> Topology:
    watch = Watch(model)
    kvs = [SequenceKV.alone(TRACE_TOKENS) for _ in range(2)]
    parts = [LanePart((number, 0), (), [0] * TRACE_TOKENS, 0) for number in range(2)]
    with _naming_faults(), watch.watching():
        cache.begin([(kv, TRACE_TOKENS) for kv in kvs])
        try:
            run_packed(model, cache, parts, last_rows(parts))
        finally:
            cache.end(commit=False)
    kv = kvs[0].store
    return _facts(
        watch,
        expanded_layers=frozenset(cache.expanded_layers),
        ruled_masks=cache.ruled,
        block_masks=cache.block_masks,
        kv_numbers_per_token=max(1, kv.numbers_per_token),
        attention_layers=max(1, len(kv.layers)),
        lane=LaneChoice(Lane.PACKED),
        kv_fixed_numbers=kept_numbers(kvs[0].state),
        tokens=TRACE_TOKENS * len(parts),
    )


def _trace_sequential(model: PreTrainedModel, reason: str) -> Topology:
    """A prompt, and more of it: what its cache grows by is what a token takes."""
    watch = Watch(model)
    with _naming_faults():
        with watch.watching():
            _, cache = run_one(model, None, [0] * FIRST_TOKENS, 0, [0])
        least = kept_numbers(cache)
        with watch.watching():
            _, cache = run_one(model, cache, [0] * MORE_TOKENS, FIRST_TOKENS, [0])
            most = kept_numbers(cache)
            watch.runs.clear()
            run_one(model, cache, [0], FIRST_TOKENS + MORE_TOKENS, [0])
    per_token = max(1, -(-(most - least) // MORE_TOKENS))
    return _facts(
        watch,
        expanded_layers=frozenset(),
        ruled_masks=False,
        block_masks=False,
        kv_numbers_per_token=per_token,
        attention_layers=max(1, len(getattr(cache, "layers", ()))),
        lane=LaneChoice(Lane.SEQUENTIAL, reason),
        kv_fixed_numbers=max(0, least - per_token * FIRST_TOKENS),
        tokens=1,
    )


@contextmanager
def _naming_faults() -> Iterator[None]:
    """What a model's own code raises over something that a lane does not have."""
    try:
        yield
    except (
        UnknownKeyword,
        NotImplementedError,
        RuntimeError,
        AttributeError,
        TypeError,
        ValueError,
        LookupError,
    ) as error:
        raise _NotThisLane(str(error)) from error


def _facts(
    watch: Watch,
    *,
    expanded_layers: frozenset[int],
    ruled_masks: bool,
    block_masks: bool,
    kv_numbers_per_token: int,
    attention_layers: int,
    lane: LaneChoice,
    kv_fixed_numbers: int,
    tokens: int,
) -> Topology:
    paths = tuple(path for path, _, _ in watch.runs)
    if len(set(paths)) != len(paths) or not paths:
        raise _NotThisLane("their experts do not run once per pass")
    return Topology(
        experts_paths=paths,
        routers=tuple(watch.router(hidden, ids) for _, hidden, ids in watch.runs),
        experts_per_token=tuple(ids.shape[1] for _, _, ids in watch.runs),
        rows_are_tokens=all(ids.shape[0] == tokens for _, _, ids in watch.runs),
        expanded_layers=expanded_layers,
        ruled_masks=ruled_masks,
        block_masks=block_masks,
        kv_numbers_per_token=kv_numbers_per_token,
        attention_layers=attention_layers,
        lane=lane,
        kv_fixed_numbers=kv_fixed_numbers,
        writes_scores=block_masks or watch.model.config._attn_implementation == "eager",
        inputs_unchanged=watch.inputs_unchanged,
        read_in_place=frozenset(watch.read_in_place),
        absent_paths=watch.never_run(),
    )
