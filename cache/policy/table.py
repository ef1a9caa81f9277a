"""Which slot holds whom: the one place where a slot changes its state.

    FREE --begin--> LOADING --arrived--> READY --evict--> FREE
                    LOADING --failed---> FREE

Knows no memory and no policy.
"""

from collections.abc import Iterable, Sequence

from moestro.cache.facts import ExpertKey, SlotState

NOWHERE = -1


class SlotTable:
    """Attributes are for reading, but pinned, guessed and passing: their owners change those."""

    def __init__(self, slots: int, experts_per_layer: Sequence[int]) -> None:
        self.where = [[NOWHERE] * count for count in experts_per_layer]  # [layer][expert] -> slot
        self.ready = bytearray(slots)  # 1 where READY: read on every lookup
        self.keys: list[ExpertKey | None] = [None] * slots
        self.pinned: set[int] = set()  # slots of the open lease: must stay
        self.guessed: set[int] = set()  # slots brought by a prefetch and not asked for since
        self.passing: dict[int, None] = {}  # slots of experts that only pass, first come first
        self.loading: set[int] = set()
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self.keys) - len(self._free)

    def state(self, slot: int) -> SlotState:
        if self.keys[slot] is None:
            return SlotState.FREE
        return SlotState.READY if self.ready[slot] else SlotState.LOADING

    def begin(self, key: ExpertKey) -> int:
        """Gives `key` a free slot, which is LOADING from now on."""
        if self.where[key.layer][key.expert] != NOWHERE:
            raise RuntimeError(f"{key} has a slot already")
        slot = self._free.pop()
        self.keys[slot] = key
        self.where[key.layer][key.expert] = slot
        self.loading.add(slot)
        return slot

    def arrived(self, slots: Iterable[int]) -> None:
        loading, ready = self.loading, self.ready
        for slot in slots:
            loading.remove(slot)
            ready[slot] = 1

    def failed(self, slot: int) -> ExpertKey:
        """Frees a slot whose read failed; says who was to come."""
        self.loading.remove(slot)
        return self._clear(slot)

    def evict(self, slot: int) -> ExpertKey:
        """Frees a READY slot that nobody uses; says who was there."""
        if not self.ready[slot] or slot in self.pinned:
            raise RuntimeError(f"slot {slot} is {self.state(slot).value} or in use")
        self.ready[slot] = 0
        return self._clear(slot)

    def pass_on(self, slots: Sequence[int], keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Gives READY slots that nobody uses to other experts, in one go; says who was there.

        The slots are LOADING from now on, and passing, as they have been.
        """
        where, ready, passing, left = self.where, self.ready, self.passing, list[ExpertKey]()
        for slot, key in zip(slots, keys, strict=True):
            old = self.keys[slot]
            if old is None or not ready[slot] or slot in self.pinned:
                raise RuntimeError(f"slot {slot} is {self.state(slot).value} or in use")
            if where[key.layer][key.expert] != NOWHERE:
                raise RuntimeError(f"{key} has a slot already")
            where[old.layer][old.expert] = NOWHERE
            where[key.layer][key.expert] = slot
            self.keys[slot] = key
            ready[slot] = 0
            del passing[slot]
            passing[slot] = None
            left.append(old)
        self.guessed.difference_update(slots)
        self.loading.update(slots)
        return left

    def _clear(self, slot: int) -> ExpertKey:
        key = self.keys[slot]
        if key is None:
            raise RuntimeError(f"slot {slot} is free")
        self.keys[slot] = None
        self.where[key.layer][key.expert] = NOWHERE
        self.guessed.discard(slot)
        self.passing.pop(slot, None)
        self.pinned.discard(slot)
        self._free.append(slot)
        return key

    def check(self) -> None:
        """Raises AssertionError when map, slots, states and sets tell different stories."""
        held = {slot: key for slot, key in enumerate(self.keys) if key is not None}
        mapped = {
            slot: ExpertKey(layer, expert)
            for layer, row in enumerate(self.where)
            for expert, slot in enumerate(row)
            if slot != NOWHERE
        }
        entries = sum(slot != NOWHERE for row in self.where for slot in row)
        ready = {slot for slot, flag in enumerate(self.ready) if flag}
        agree("slots by content, slots by expert", held, mapped)
        agree("experts with a slot, slots with an expert", entries, len(held))
        agree("free slots, slots without an expert", sorted(self._free), sorted(self._empty()))
        agree("READY or LOADING slots, slots with an expert", ready | self.loading, set(held))
        agree("slots READY and LOADING at once, none", ready & self.loading, set())
        agree("pinned slots that are free, none", self.pinned - set(held), set())
        agree("guessed slots that are free, none", self.guessed - set(held), set())
        agree("passing slots that are free, none", set(self.passing) - set(held), set())

    def _empty(self) -> list[int]:
        return [slot for slot, key in enumerate(self.keys) if key is None]


def agree(what: str, one: object, other: object) -> None:
    """Raises AssertionError with both sides; `what` names them in this order."""
    if one != other:
        raise AssertionError(f"{what}: {one} against {other}")
