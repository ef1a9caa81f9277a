"""Who has a slot in the host tier, the one between the device's slots and the pack.

The device asks for what it misses; copies read from host slots while the device's are filled.
The host's policy hears of these alone: whoever never leaves the device looks unused from below,
and should, for the host need not keep it, too. Knows no memory, no reads, no link.
"""

from collections.abc import Iterator, Sequence

from moestro.cache.facts import ExpertKey, HostMode

from .lru import Policy
from .table import NOWHERE, SlotTable, agree


class HostResidency:
    """`table` is for reading; its pinned slots are copied from, or lent."""

    def __init__(self, table: SlotTable, device: SlotTable, policy: Policy, mode: HostMode) -> None:
        """`device` is the table of the tier above; only asked."""
        self.table = table
        self.mode = mode
        self.evictions = 0
        self.keys = [
            [ExpertKey(layer, expert) for expert in range(len(row))]
            for layer, row in enumerate(table.where)
        ]
        self._policy = policy
        self._device = device
        self._copies: dict[int, int] = {}  # of each slot that copies read from
        self._lent: set[int] = set()  # slots computed with where they lie
        self._doubled: dict[int, None] = {}  # slots copied to the device, first come first

    def asked(self, layer: int, experts: Sequence[int]) -> None:
        """The device asks for `experts`, here or not."""
        if self.mode is not HostMode.WHOLE:  # where nobody leaves, nobody's order matters
            keys = self.keys[layer]
            self._policy.asked([keys[expert] for expert in experts])

    def take(self, key: ExpertKey) -> int:
        """A free slot (there is one) for `key`."""
        slot = self.table.begin(key)
        self._policy.added(key)
        return slot

    def failed(self, slot: int) -> None:
        """Frees a slot whose read failed."""
        self._policy.removed(self.table.failed(slot))

    def pin(self, slot: int) -> None:
        """A copy reads from `slot`: it keeps its expert until as many `unpin`s."""
        self._copies[slot] = self._copies.get(slot, 0) + 1
        self.table.pinned.add(slot)

    def unpin(self, slot: int) -> None:
        """A copy from `slot` ended: the device has this expert, too."""
        self._copies[slot] -= 1
        if not self._copies[slot]:
            del self._copies[slot]
            if slot not in self._lent:
                self.table.pinned.remove(slot)
        if self.mode is HostMode.EXCLUSIVE:
            self._doubled.pop(slot, None)
            self._doubled[slot] = None

    def lend(self, slot: int) -> None:
        """`slot` is computed with: it keeps its expert until `give_back`."""
        self._lent.add(slot)
        self.table.pinned.add(slot)

    def give_back(self) -> None:
        """Nobody computes with host slots any more."""
        self.table.pinned.difference_update(self._lent - self._copies.keys())
        self._lent.clear()

    def make_room(self, count: int) -> int:
        """Up to `count` free slots, evicting for them; how many there are."""
        table = self.table
        if table.free < count and self._doubled:
            doubled = zip(self._on_device(), range(count - table.free), strict=False)
            self._evict([slot for slot, _ in doubled])
        if table.free < count:
            busy = (*table.loading, *table.pinned)
            unevictable = {key for slot in busy if (key := table.keys[slot]) is not None}
            kept = self._policy.keys()
            wanted = min(count - table.free, len(kept) - len(unevictable))
            victims = self._policy.victims(wanted, unevictable)
            if victims is None:
                raise RuntimeError(f"the policy has no {wanted} victims among {len(kept)} keys")
            self._evict([table.where[key.layer][key.expert] for key in victims])
        return min(count, table.free)

    def check(self) -> None:
        """Raises AssertionError when two views of the truth differ."""
        table = self.table
        table.check()
        held = {key for key in table.keys if key is not None}
        agree("keys of the host's policy, keys with a host slot", set(self._policy.keys()), held)
        users = set(self._copies) | self._lent
        agree("pinned host slots, sources of copies or lent", table.pinned, users)
        idle = {slot for slot in table.pinned if not table.ready[slot]}
        agree("sources of copies that are not READY, none", idle, set())

    def copies(self) -> dict[int, int]:
        """How many copies read from each pinned slot."""
        return dict(self._copies)

    def _on_device(self) -> Iterator[int]:
        """Slots that may go and whose expert the device has, too, which is then its only place.

        Who has been up there longest goes first: the device will not part with it soon.
        """
        table, where = self.table, self._device.where
        for slot in list(self._doubled):
            key = table.keys[slot]
            if key is None or where[key.layer][key.expert] == NOWHERE:
                del self._doubled[slot]
            elif table.ready[slot] and slot not in table.pinned:
                yield slot

    def _evict(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._policy.removed(self.table.evict(slot))
            self._doubled.pop(slot, None)
        self.evictions += len(slots)
