"""Which experts have slots and which are evicted.

Table, policy and counters change together here, or not at all.

The live cache (lease.py, loader.py) and replayer.py decide with this same code, which is why
replayed hits are live hits. Knows no memory and no reads.

A *streaming* event is one of a prompt, or one that asks for more experts than there are slots.
Nearly every expert of its layer passes through, once: given slots like others they would evict all
that decoding needs. So it takes free slots, and beyond them no more than `stream_slots`, whose
experts are *passing*: the first to leave, until a decode event asks for them.

A *sweep* is a decode event that asks for nearly all experts of its layer, as nearly all layers'
last events did: steps of many sequences are such. There are slots for more than two layers and not
for all. It streams, too: whoever it evicted would be asked for as soon, so those that are kept
stay, and the others pass. It tells the policy nothing.

What a prompt asked for most, its answer will ask for, too. These experts pass by anyway: where the
policy expects them sooner than others that are kept, they are kept instead (`admit`).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

from moestro.cache.facts import ExpertKey, Phase, Routed

from .counters import Counters
from .lru import Policy
from .table import NOWHERE, SlotTable

STREAM_SHARE = 8
"""One in so many slots may be passing. Fewer shorten the reads, more cost decoding its hits."""

LEFT_OUT_SHARE = 4
"""A sweep leaves out at most one in so many experts of its layer."""
OTHER_LAYERS_SHARE = 8
"""At most one in so many layers asked for fewer the last time."""


class Residency:
    """`table`, `policy` and `counters` are for reading; slots change hands through the methods."""

    def __init__(
        self,
        table: SlotTable,
        policy: Policy,
        counters: Counters,
        experts_per_layer: Sequence[int],
        *,
        sweeping: bool = False,
    ) -> None:
        """`policy` knows whom it may name: who is kept.

        `sweeping`: see above; else none sweeps, and nothing is read for prompts ahead of time.
        """
        self.table = table
        self.policy = policy
        self.counters = counters
        self.keys = [
            [ExpertKey(layer, expert) for expert in range(count)]
            for layer, count in enumerate(experts_per_layer)
        ]
        self.left: list[ExpertKey] = []  # evicted by the last `make_room`
        self.stream_slots = min(len(table.keys), max(2, len(table.keys) // STREAM_SHARE))
        two = 2 * max(experts_per_layer, default=0)  # layers, through which a sweep's others pass
        self.reads_ahead = sweeping
        """Whole layers are read before they ask, for sweeps and for prompts."""
        self._sweeping = sweeping and two < len(table.keys) < sum(experts_per_layer)
        rest = max(1, sum(experts_per_layer) - two)
        share = max(0, len(table.keys) - two) / rest
        self._fair = [int(share * count) for count in experts_per_layer]  # that sweeps keep
        self._uneven = set[int]()  # layers of which something else is kept
        self._asked_nearly_all = [False] * len(experts_per_layer)  # by the last decode event

    def streams(self, layer: int, requested: int, phase: Phase) -> bool:
        """An event of `requested` experts must not be given slots at the expense of decoding."""
        if phase is Phase.PREFILL or requested > len(self.table.keys):
            return True
        return self.sweeps(layer, requested, phase)

    def sweeps(self, layer: int, requested: int, phase: Phase) -> bool:
        """An event of `requested` experts is a sweep."""
        if not self._sweeping or phase is Phase.PREFILL or not self.nearly_all(layer, requested):
            return False
        others = self._asked_nearly_all.count(False)
        return OTHER_LAYERS_SHARE * others <= len(self._asked_nearly_all)

    def note(self, layer: int, requested: int, phase: Phase) -> None:
        """An event begins: what `sweeps` goes by."""
        if self._sweeping and phase is Phase.DECODE:
            self._asked_nearly_all[layer] = self.nearly_all(layer, requested)

    def will_sweep(self, layer: int) -> bool:
        """Its last event asked for nearly all: so will the next one, in a step that sweeps."""
        return self._asked_nearly_all[layer]

    def nearly_all(self, layer: int, requested: int) -> bool:
        """So many of the layer's experts are nearly all of them."""
        experts = len(self.keys[layer])
        return LEFT_OUT_SHARE * (experts - requested) <= experts

    def ask(
        self, layer: int, experts: Sequence[int], phase: Phase, routed: Routed | None = None
    ) -> list[int]:
        """A layer event begins: tells the policy and pins those of `experts` that are here.

        Their slots, in the order of the request. What decoding asks for is no longer passing.
        """
        table, keys = self.table, self.keys[layer]
        row, ready = table.where[layer], table.ready
        self.note(layer, len(experts), phase)
        here = [slot for expert in experts if (slot := row[expert]) >= 0 and ready[slot]]
        table.pinned.update(here)
        if self.sweeps(layer, len(experts), phase):
            self.line_up(layer, here)
            return here
        self.policy.asked([keys[expert] for expert in experts], routed)
        if table.passing and phase is Phase.DECODE:
            self._keep(here)
        return here

    def _keep(self, slots: Iterable[int]) -> None:
        """Those of `slots` that are passing do not pass any more."""
        passing = self.table.passing
        for slot in slots:
            if slot in passing and (key := self.table.keys[slot]) is not None:
                del passing[slot]
                self.policy.added(key)

    def line_up(self, layer: int, slots: Iterable[int]) -> None:
        """One of a sweep's `slots` more is kept, or one fewer, or another one.

        To a sweep all experts are the same. In the end every layer keeps the same share, so that
        what two layers lack can pass at once, and keeps its first experts: the others are
        neighbours, which are read in one go.
        """
        if layer not in self._uneven:
            return
        self._uneven.remove(layer)
        keys, passing = self.table.keys, self.table.passing
        numbers = {key.expert: slot for slot in slots if (key := keys[slot]) is not None}
        passes = [number for number, slot in numbers.items() if slot in passing]
        kept, wanted = len(numbers) - len(passes), self._fair[layer]
        first = min(passes, default=len(self.keys[layer]))
        last = max((number for number, slot in numbers.items() if slot not in passing), default=-1)
        exchanged = kept == wanted and first < last
        if (kept > wanted and len(passing) < self.stream_slots) or exchanged:
            passing[numbers[last]] = None
            self.policy.removed(self.keys[layer][last])
        if (kept < wanted and passes) or exchanged:
            self._keep([numbers[first]])

    def admit(self, layer: int, wanted: Sequence[int], asked: Sequence[int]) -> list[int]:
        """Evicts those whom the policy expects later than some of `wanted`, a prompt's.

        `wanted`, ascending, but first those that there is a free slot for now.
        """
        policy, keys, kept = self.policy, self.keys[layer], self.policy.keys()
        best = sorted(wanted, key=lambda expert: -policy.keep_score(keys[expert]))
        unevictable = self._unevictable({keys[expert] for expert in asked})
        room = self.table.free
        most = min(len(best) - room, len(kept) - len(unevictable))
        leaving = []
        for expert, victim in zip(
            best[room:], policy.victims(most, unevictable) or (), strict=False
        ):
            if policy.keep_score(keys[expert]) <= policy.keep_score(victim):
                break
            leaving.append(self.table.where[victim.layer][victim.expert])
        self.evict(leaving)
        room = self.table.free
        return [*sorted(best[:room]), *sorted(best[room:])]

    def assign(
        self, layer: int, wanted: Sequence[int], asked: Sequence[int], phase: Phase
    ) -> list[int]:
        """Slots for as many of `wanted` as may have one now, first ones first, evicting for them.

        `wanted` are the experts without a slot among those that the event asks for.
        """
        keys, free = self.keys[layer], self.table.free
        event = {keys[expert] for expert in asked}
        if not self.streams(layer, len(asked), phase):
            room = self.make_room(len(wanted), event)
            return self.take(layer, wanted[:room])
        room = self.make_room(len(wanted), event, self.stream_slots - len(self.table.passing))
        return self.take(layer, wanted[:room], passing=room - free)

    def assign_ahead(self, layer: int, wanted: Sequence[int], used: int) -> list[int]:
        """Slots for as many of `wanted`, ascending, as may have one before their layer is swept.

        Whoever is here of layer `used`, which runs, and of `layer` itself stays.
        """
        if len(wanted) + self._fair[layer] != len(self.keys[layer]) or not _neighbours(wanted):
            self._uneven.add(layer)
        slots = [] if self.table.free else self._pass_on(layer, wanted, used)
        if len(slots) == len(wanted):
            return slots
        rest, free = wanted[len(slots) :], self.table.free
        most_victims = self.stream_slots - len(self.table.passing)
        staying = {*self.keys[layer], *self.keys[used]}
        room = self.make_room(len(rest), staying, max(0, most_victims))
        return [*slots, *self.take(layer, rest[:room], passing=room - free)]

    def assign_for_prompt(self, layer: int, wanted: Sequence[int]) -> list[int]:
        """Slots for the first of `wanted` before a prompt's event of `layer` asks for nearly all.

        Those of experts that only passed, and of other layers: who is kept stays. None while there
        are free slots, which an event gives to whom it keeps.
        """
        if not self.reads_ahead or self.table.free:
            return []
        room = self.make_room(len(wanted), set(self.keys[layer]), 0)
        return self.take(layer, wanted[:room], passing=room)

    def _pass_on(self, layer: int, experts: Sequence[int], used: int) -> list[int]:
        """For the first of `experts`, slots whose own only passed, as far as there are any."""
        table, keys, counters = self.table, self.keys[layer], self.counters
        staying = {*table.where[layer], *table.where[used]}
        leaving = (slot for slot in self._idle() if slot not in staying)
        slots = list(islice(leaving, len(experts)))
        counters.wasted += len(table.guessed.intersection(slots))
        for key in table.pass_on(slots, [keys[expert] for expert in experts[: len(slots)]]):
            counters.evictions[key.layer] += 1
        return slots

    def take(self, layer: int, experts: Sequence[int], passing: int = 0) -> list[int]:
        """Free slots (there are enough) for `experts`; the last `passing` of them only pass."""
        table, keys, added = self.table, self.keys[layer], self.policy.added
        slots = [table.begin(keys[expert]) for expert in experts]
        kept = len(slots) - max(0, passing)
        for expert in experts[:kept]:
            added(keys[expert])
        table.passing.update(dict.fromkeys(slots[kept:]))
        return slots

    def make_room(
        self, count: int, protected: Collection[ExpertKey], most_victims: int | None = None
    ) -> int:
        """Up to `count` free slots, evicting for them outside `protected`; how many there are.

        Passing experts leave first, then at most `most_victims` that the policy names.
        """
        table = self.table
        self.left = []
        if table.free < count and table.passing:
            leaving = self._leaving(protected)
            slots = [slot for slot, _ in zip(leaving, range(count - table.free), strict=False)]
            self.left += self.evict(slots)
        if table.free < count:
            kept, unevictable = self.policy.keys(), self._unevictable(protected)
            wanted = min(count - table.free, len(kept) - len(unevictable))
            if most_victims is not None:
                wanted = min(wanted, most_victims)
            victims = self.policy.victims(wanted, unevictable)
            if victims is None:
                raise RuntimeError(f"the policy has no {wanted} victims among {len(kept)} keys")
            self.left += self.evict([table.where[key.layer][key.expert] for key in victims])
        return min(count, table.free)

    def evict(self, slots: Sequence[int]) -> list[ExpertKey]:
        """Frees READY, unpinned slots; who was there."""
        left = []
        for slot in slots:
            if slot in self.table.guessed:
                self.counters.wasted += 1
            passes = slot in self.table.passing
            key = self.table.evict(slot)
            if not passes:
                self.policy.removed(key)
            self.counters.evictions[key.layer] += 1
            left.append(key)
        return left

    def failed(self, slot: int) -> None:
        """Frees a slot whose read failed."""
        if slot in self.table.guessed:
            self.counters.wasted += 1
        passes = slot in self.table.passing
        key = self.table.failed(slot)
        if not passes:
            self.policy.removed(key)

    def rotation(self, held: Sequence[int], slots: Sequence[int]) -> list[int]:
        """Slots that the rest of an event takes turns in: of its `slots` or, before them, `held`.

        The first one is given up first, as soon as its expert is done. Which experts are kept
        depends on this order alone, never on the order in which reads end.
        """
        passing = self.table.passing
        streaming = [slot for slot in (*held, *slots) if slot in passing]
        return streaming or list(slots) or list(held[: self.stream_slots])

    def replace(self, layer: int, slots: Sequence[int], experts: Sequence[int]) -> list[int]:
        """Evicts `slots` of a rotation for as many `experts`; the slots these were given."""
        passing = sum(slot in self.table.passing for slot in slots)
        self.evict(slots)
        return self.take(layer, experts, passing)

    def _unevictable(self, protected: Iterable[ExpertKey]) -> set[ExpertKey]:
        """Kept keys that nobody may evict now."""
        table, kept = self.table, self.policy.keys()
        loading = (key for slot in table.loading if (key := table.keys[slot]) is not None)
        return {key for key in (*loading, *protected) if key in kept}

    def _leaving(self, protected: Collection[ExpertKey]) -> Iterator[int]:
        """Slots whose experts were passing and may go now, first come first."""
        keys = self.table.keys
        return (slot for slot in self._idle() if keys[slot] not in protected)

    def _idle(self) -> Iterator[int]:
        """Slots whose experts were passing and nobody uses, first come first."""
        table = self.table
        return (slot for slot in table.passing if table.ready[slot] and slot not in table.pinned)


def _neighbours(experts: Sequence[int]) -> bool:
    return not experts or experts[-1] - experts[0] == len(experts) - 1


def missing(row: Sequence[int], experts: Sequence[int]) -> list[int]:
    """Those without a slot, neither READY nor LOADING; `row` is the table's row of the layer."""
    return [expert for expert in experts if row[expert] == NOWHERE]
