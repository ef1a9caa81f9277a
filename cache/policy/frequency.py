"""Policies that remember how often each expert was asked for, also while it had no slot.

Counts decay by the events of their own layer: an expert's rate is about the share of its layer's
last `half_life_events` x 1.44 events that asked for it. Knows keys, nothing of slots or reads.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from itertools import chain
from math import inf
from operator import add

from moestro.cache.facts import ExpertKey, Routed

HALF_LIFE_EVENTS = 16
"""Of one layer, which is steps. The demo model's traces like 4 to 16, published ones 16 to 64."""

_LARGEST = 1e200  # of the weight that new events count with; then all is divided by it
_LEAST_RATE = 1e-3


class _Layer:
    """Rates of one layer's experts. New events weigh more, so that old ones need no touching."""

    def __init__(
        self,
        half_life_events: float,
        last_event_share: float,
        worth: Callable[[float], float],
    ) -> None:
        """`worth` of a rate grows with it: a key's score, but for when its layer's turn comes."""
        self.counts: dict[int, float] = {}
        self._half_life = half_life_events
        self._growth = 2 ** (1 / half_life_events)
        self._share = last_event_share
        self._worth = worth
        self._last: dict[ExpertKey, float] = {}  # share of the last event's tokens that chose it
        self._weight = 1.0
        self._total = 1.0  # of all events
        self._unseen = 0.5  # count of who was never asked for: nothing is known of it
        self._kept: list[ExpertKey] = []  # lowest rate first, unless stale
        self._rates: list[float] = []  # of the kept ones
        self._worths: list[float] = []  # of these rates: many evictions ask for them
        self._stale = False

    def asked(self, keys: Sequence[ExpertKey]) -> None:
        self._weight *= self._growth
        self._count(dict.fromkeys(keys, 1.0), self._weight)

    def routed(self, keys: Sequence[ExpertKey], routed: Routed) -> None:
        """Like as many decode steps that choose as the prompt's tokens did.

        A prompt says what its answer will ask for, but others decode, too: it counts as one
        half-life at most, which leaves the past half its weight.
        """
        events = min(routed.tokens, self._half_life)
        self._weight *= self._growth**events
        weight = self._weight * (1 - self._growth**-events) / (1 - 1 / self._growth)
        shares = [count / routed.tokens for count in routed.counts]
        self._count(dict(zip(keys, shares, strict=True)), weight)

    def _count(self, shares: dict[ExpertKey, float], weight: float) -> None:
        counts, unseen = self.counts, self._unseen
        self._total += weight
        for key, share in shares.items():
            expert = key.expert
            counts[expert] = counts.get(expert, unseen) + weight * share
        self._last = shares
        self._stale = True
        if (weight := self._weight) > _LARGEST:
            self.counts = {expert: count / weight for expert, count in counts.items()}
            self._total /= weight
            self._unseen /= weight
            self._weight = 1.0

    def rate(self, key: ExpertKey) -> float:
        """Between 0 and 1: how likely the layer's next event is to ask for `key`."""
        counted = self.counts.get(key.expert, self._unseen) / self._total
        return counted + self._share * (self._last.get(key, 0.0) - counted)

    def add(self, key: ExpertKey) -> None:
        rate = self.rate(key)
        place = bisect_right(self._rates, rate)
        self._kept.insert(place, key)
        self._rates.insert(place, rate)
        self._worths.insert(place, self._worth(rate))

    def remove(self, key: ExpertKey) -> None:
        place = self._kept.index(key)
        del self._kept[place], self._rates[place], self._worths[place]

    def ranked(self) -> tuple[list[ExpertKey], list[float]]:
        """Kept keys and what their rates are worth, lowest first."""
        if self._stale:
            pairs = sorted((self.rate(key), key) for key in self._kept)
            self._kept = [key for _, key in pairs]
            self._rates = [rate for rate, _ in pairs]
            self._worths = [self._worth(rate) for rate in self._rates]
            self._stale = False
        return self._kept, self._worths


class DecayedFrequency:
    """The expert with the lowest rate leaves first; among equals, that of the layer just run."""

    def __init__(
        self, half_life_events: float = HALF_LIFE_EVENTS, last_event_share: float = 0.0
    ) -> None:
        """`last_event_share`: how much of a rate is whether the layer's last event asked for it."""
        if half_life_events <= 0 or not 0 <= last_event_share <= 1:
            raise ValueError("a half-life is positive, and a share between 0 and 1")
        self._half_life = half_life_events
        self._share = last_event_share
        self._layers: list[_Layer] = []
        self._kept: dict[ExpertKey, None] = {}
        self._current = 0
        # An eviction looks at all layers: at numbers side by side, not objects all over the memory.
        self._changed = set[int]()  # layers whose order has changed since the last one
        self._lowest = array("d")  # by layer: the worth of whom it would give up first
        self._turns = array("d")  # by how long ago a layer ran: its part of a score

    def asked(self, keys: Sequence[ExpertKey], routed: Routed | None = None) -> None:
        if not keys:
            return
        self._current = keys[0].layer
        layer = self._layer(self._current)
        if routed is None:
            layer.asked(keys)
        else:
            layer.routed(keys, routed)
        self._changed.add(self._current)

    def keep_score(self, key: ExpertKey) -> float:
        rate = self._layer(key.layer).rate(key)
        return self._turn(self._since(key.layer)) + self._worth(rate)

    def added(self, key: ExpertKey) -> None:
        if key in self._kept:
            raise ValueError(f"{key} is kept already")
        self._kept[key] = None
        self._layer(key.layer).add(key)
        self._changed.add(key.layer)

    def removed(self, key: ExpertKey) -> None:
        del self._kept[key]
        self._layers[key.layer].remove(key)
        self._changed.add(key.layer)

    def victims(self, count: int, protected: Container[ExpertKey]) -> list[ExpertKey] | None:
        """A merge of the layers' own orders; among equals the layer that ran last comes first."""
        found: list[ExpertKey] = []
        if count <= 0:
            return found
        self._settle()
        current, lowest, turns = self._current, self._lowest, self._turns
        since_order = lowest[current::-1] + lowest[:current:-1]
        scores = list(map(add, turns, since_order))
        opened: dict[int, Iterator[tuple[ExpertKey, float]]] = {}
        while (least := min(scores, default=inf)) < inf:
            since = scores.index(least)
            if since not in opened:
                keys, worths = self._layers[(current - since) % len(scores)].ranked()
                opened[since] = zip(keys, chain(worths[1:], [inf]), strict=False)
            key, following = next(opened[since])
            scores[since] = turns[since] + following
            if key not in protected:
                found.append(key)
                if len(found) == count:
                    return found
        return None

    def keys(self) -> Collection[ExpertKey]:
        return self._kept.keys()

    def _layer(self, number: int) -> _Layer:
        while len(self._layers) <= number:
            self._layers.append(_Layer(self._half_life, self._share, self._worth))
            self._lowest.append(inf)
            self._turns = array("d", map(self._turn, range(len(self._layers))))
        return self._layers[number]

    def _settle(self) -> None:
        for number in self._changed:
            _, worths = self._layers[number].ranked()
            self._lowest[number] = worths[0] if worths else inf
        self._changed.clear()

    def _since(self, layer: int) -> int:
        """Layers run since this one did: 0 for the current one, which runs again last."""
        return (self._current - layer) % len(self._layers)

    # A key's score, which leaves the sooner the lower it is, is the sum of these two.

    def _worth(self, rate: float) -> float:
        """Grows with the rate."""
        return rate

    def _turn(self, since: int) -> float:
        """Of a layer that ran `since` layers ago."""
        return 0.0


class NextUse(DecayedFrequency):
    """Whoever is expected to be asked for latest leaves first.

    Layers run in a circle, so when a layer's turn comes is known, and only whether it will ask
    for an expert is a guess: 1 / rate turns, the first of them as far off as the layer is.
    Least recently used fails at a circle longer than the cache: it evicts what comes next.
    """

    def __init__(
        self, half_life_events: float = HALF_LIFE_EVENTS, last_event_share: float = 0.25
    ) -> None:
        super().__init__(half_life_events, last_event_share)

    def _worth(self, rate: float) -> float:
        return -1 / max(_LEAST_RATE, rate)

    def _turn(self, since: int) -> float:
        return since / len(self._layers)
