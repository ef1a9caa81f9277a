"""Which pages of the KV are whose. Integers only: what lies in a page is known to the model's wing.

A page holds PAGE_TOKENS tokens of every layer. Pages of one sequence should follow each other,
because attention reads such a run without a copy: so a taker gets the smallest free run that holds
all it wants, and only where there is none, the largest ones there are.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from moestro.engine.facts import PAGE_TOKENS


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


class PagePool:
    """A fixed number of pages, each free or used by one or more sequences."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free_pages = pages
        self._uses = [0] * pages
        self._runs = [(0, pages)] if pages else []  # free ones: (first page, length), in order

    @property
    def used_pages(self) -> int:
        return self.pages - self.free_pages

    def take(self, count: int) -> list[int]:
        """`count` free pages, used once from now on. The caller has looked at `free_pages`."""
        assert count <= self.free_pages, f"{count} pages wanted, {self.free_pages} are free"
        taken: list[int] = []
        while len(taken) < count:
            taken += self._cut(count - len(taken))
        for page in taken:
            self._uses[page] = 1
        self.free_pages -= count
        return taken

    def share(self, pages: Sequence[int]) -> list[int]:
        """The same pages, used once more."""
        for page in pages:
            assert self._uses[page] > 0, f"page {page} is free"
            self._uses[page] += 1
        return list(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Used once less; those that nobody uses any more are free."""
        for page in pages:
            assert self._uses[page] > 0, f"page {page} is free already"
            self._uses[page] -= 1
            if self._uses[page] == 0:
                self._put_back(page)
                self.free_pages += 1

    def check(self, owners: Sequence[Sequence[int]]) -> None:
        """The pages of all owners are the uses; free runs and used pages are the whole."""
        uses = [0] * self.pages
        for pages in owners:
            assert len(set(pages)) == len(pages), "an owner has a page twice"
            for page in pages:
                uses[page] += 1
        assert uses == self._uses
        free = [page for first, length in self._runs for page in range(first, first + length)]
        assert free == [page for page, used in enumerate(uses) if used == 0]
        assert len(free) == self.free_pages

    def _cut(self, wanted: int) -> list[int]:
        enough = [run for run in self._runs if run[1] >= wanted]
        first, length = (
            min(enough, key=lambda run: (run[1], run[0]))
            if enough
            else max(self._runs, key=lambda run: (run[1], -run[0]))
        )
        self._runs.remove((first, length))
        used = min(wanted, length)
        if length > used:
            insort(self._runs, (first + used, length - used))
        return list(range(first, first + used))

    def _put_back(self, page: int) -> None:
        place = bisect_left(self._runs, (page, 0))
        first, length = page, 1
        if place < len(self._runs) and self._runs[place][0] == page + 1:
            length += self._runs.pop(place)[1]
        if place and sum(self._runs[place - 1]) == page:
            before = self._runs.pop(place - 1)
            first, length = before[0], before[1] + length
        insort(self._runs, (first, length))
