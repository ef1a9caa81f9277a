"""Who leaves first. Knows keys and their order, nothing of slots, bytes or reads."""

from collections import OrderedDict
from collections.abc import Collection, Container, Sequence
from typing import Protocol

from .keys import ExpertKey


class Policy(Protocol):
    """Keeps an order over exactly the keys that have a slot.

    The cache calls `added` and `removed` as slots change hands and `touched` once per layer
    event: the experts of one event are used together, so their mutual order is the order in which
    the event named them and carries no meaning.
    """

    def added(self, key: ExpertKey) -> None:
        """`key` was given a slot; it was not kept before."""

    def touched(self, keys: Sequence[ExpertKey]) -> None:
        """One layer event asked for `keys`, all of them kept."""

    def removed(self, key: ExpertKey) -> None:
        """`key` lost its slot: evicted, or its read failed."""

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

    def added(self, key: ExpertKey) -> None:
        if key in self._order:
            raise ValueError(f"{key} is kept already")
        self._order[key] = None

    def touched(self, keys: Sequence[ExpertKey]) -> None:
        move = self._order.move_to_end
        for key in keys:
            move(key)

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
