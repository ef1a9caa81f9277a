"""Who leaves first. Knows keys and their order, nothing of slots, bytes or reads."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from typing import Protocol

from moestro.cache.facts import ExpertKey, Routed


class Policy(Protocol):
    """Keeps an order over exactly the keys that have a slot and do not only pass (residency.py).

    The cache calls `asked` once per layer event that is no sweep, before it makes room for those
    that are missing, and `added` and `removed` as slots change hands. Layers run in ascending
    order, step after step.
    """

    def asked(self, keys: Sequence[ExpertKey], routed: Routed | None = None) -> None:
        """One layer event asks for `keys`, of one layer, kept or not; `routed`, for a prompt.

        They are used together: their mutual order carries no meaning.
        """

    def keep_score(self, key: ExpertKey) -> float:
        """What speaks for keeping `key`, kept or not: the higher the more, and for victims least.

        0 for every key where nothing is known of those that are not kept.
        """

    def added(self, key: ExpertKey) -> None:
        """`key` was given a slot; it was not kept before. Raises ValueError if it was."""

    def removed(self, key: ExpertKey) -> None:
        """`key` lost its slot: evicted, or its read failed. Raises KeyError if it had none."""

    def victims(self, count: int, protected: Container[ExpertKey]) -> list[ExpertKey] | None:
        """`count` kept keys outside `protected`, first to leave first; changes nothing.

        None when there are fewer: all or nothing.
        """

    def keys(self) -> Collection[ExpertKey]:
        """All kept keys."""


class Lru:
    """The event longest ago leaves first."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()  # oldest first

    def asked(self, keys: Sequence[ExpertKey], routed: Routed | None = None) -> None:
        order, move = self._order, self._order.move_to_end
        for key in keys:
            if key in order:
                move(key)

    def keep_score(self, key: ExpertKey) -> float:
        return 0.0

    def added(self, key: ExpertKey) -> None:
        if key in self._order:
            raise ValueError(f"{key} is kept already")
        self._order[key] = None

    def removed(self, key: ExpertKey) -> None:
        del self._order[key]

    def victims(self, count: int, protected: Container[ExpertKey]) -> list[ExpertKey] | None:
        found: list[ExpertKey] = []
        if count <= 0:
            return found
        for key in self._order:
            if key not in protected:
                found.append(key)
                if len(found) == count:
                    return found
        return None

    def keys(self) -> Collection[ExpertKey]:
        return self._order.keys()


class PerLayer:
    """Shares the slots out evenly: the layer that has most gives one up, by a policy of its own.

    Not a hard quota: what one layer does not use, others may.
    """

    def __init__(self, make: Callable[[], Policy]) -> None:
        """`make` is called once for each layer, when it is first seen."""
        self._make = make
        self._layers: dict[int, Policy] = {}
        self._kept: dict[ExpertKey, None] = {}
        self._current = 0

    def asked(self, keys: Sequence[ExpertKey], routed: Routed | None = None) -> None:
        if keys:
            self._current = keys[0].layer
            self._of(self._current).asked(keys, routed)

    def keep_score(self, key: ExpertKey) -> float:
        """Layers' own figures could not be compared."""
        return 0.0

    def added(self, key: ExpertKey) -> None:
        self._of(key.layer).added(key)
        self._kept[key] = None

    def removed(self, key: ExpertKey) -> None:
        del self._kept[key]
        self._of(key.layer).removed(key)

    def victims(self, count: int, protected: Container[ExpertKey]) -> list[ExpertKey] | None:
        free = dict.fromkeys(self._layers, 0)
        for key in self._kept:
            free[key.layer] += key not in protected
        if count > sum(free.values()):
            return None
        found: list[ExpertKey] = []
        for layer, share in self._shares(count, free).items():
            found += self._layers[layer].victims(share, protected) or []
        return found

    def keys(self) -> Collection[ExpertKey]:
        return self._kept.keys()

    def _shares(self, count: int, free: Mapping[int, int]) -> dict[int, int]:
        """How many of `count` each layer gives up, out of `free` ones; of equals, the layer that
        runs again last."""
        whole = max(free, default=0) + 1
        heap = [
            (-len(self._layers[layer].keys()), (self._current - layer) % whole, layer)
            for layer, most in free.items()
            if most
        ]
        heapify(heap)
        shares: dict[int, int] = {}
        for _ in range(count):
            kept, since, layer = heap[0]
            shares[layer] = shares.get(layer, 0) + 1
            if shares[layer] < free[layer]:
                heapreplace(heap, (kept + 1, since, layer))
            else:
                heappop(heap)
        return shares

    def _of(self, layer: int) -> Policy:
        policy = self._layers.get(layer)
        if policy is None:
            policy = self._layers[layer] = self._make()
        return policy
