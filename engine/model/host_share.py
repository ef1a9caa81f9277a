"""Who is computed where they lie: experts that a device misses, on the host that has them.

A copy over a slow link can take longer than the host takes to compute with the expert where it is
(MoNDE, arXiv 2405.18832; Fiddler, 2402.07033). Both happen at once, so the misses of a layer are
split: as many are copied as arrive while the rest, and the residents, are computed. The rates are
measured at the start. Plain arithmetic, no tensors.

On a device that computes otherwise than the host, results are not bit-identical across placement:
last digits depend on who was resident.
"""

from dataclasses import dataclass

COPY_EVERY = 8
"""A lone miss that is cheaper on the host is copied once in so many times all the same: what is
asked for again and again must come to the device at last."""


@dataclass(slots=True)
class HostShare:
    """Called once per layer event with misses; remembers only how many lone ones were here."""

    copy_s: float  # one expert over the link
    host_s: float  # one expert with few tokens, on the host
    device_s: float  # the same on the device
    lone: int = 0

    def __call__(self, residents: int, below: int) -> int:
        """How many of `below` missing experts the host computes, the device having `residents`.

        The fewest of those numbers with which copies and computing end soonest.
        """
        on_host = min(range(below + 1), key=lambda count: self._ends_s(residents, below, count))
        if on_host == below:
            self.lone += 1
            if below > 1 or self.lone % COPY_EVERY == 0:
                on_host -= 1
        return on_host

    def _ends_s(self, residents: int, below: int, on_host: int) -> float:
        copied_s = (below - on_host) * self.copy_s
        computed_s = residents * self.device_s + on_host * self.host_s
        return max(copied_s, computed_s)

    def __str__(self) -> str:
        return (
            f"a copy takes {1e3 * self.copy_s:.3g} ms, the host {1e3 * self.host_s:.3g} ms,"
            f" the device {1e3 * self.device_s:.3g} ms an expert"
        )
