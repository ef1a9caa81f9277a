"""What lies above the host's slots: a device's slots, and the link into them."""

from collections.abc import Callable

from moestro.cache.facts import HostMode, TierPlan
from moestro.cache.pack import Pack

from .link import Copy, EmulatedLink, Link, LinkSpec
from .slots import AliasArena, Arena, SlotArena

Wiring = Callable[[SlotArena], tuple[Arena, Link]]
"""From the host's slots to the device's slots and the link between them."""


def emulated(spec: LinkSpec, pack: Pack, plan: TierPlan) -> Wiring:
    """A device that is only imagined.

    Where a host slot never changes its expert (HostMode.WHOLE), the device's slots only show the
    host's: no byte is moved and the link may be faster than this machine's memory. Else they have
    memory of their own, and bytes are moved when a copy ends.
    """

    def wire(host: SlotArena) -> tuple[Arena, Link]:
        assert plan.device is not None
        if plan.mode is HostMode.WHOLE:
            alias = AliasArena(plan.device.slots, len(pack.spec.layers))
            return alias, EmulatedLink(spec, showing(host, alias))
        kinds = [layer.kinds for layer in pack.spec.layers]
        device = SlotArena(plan.device.slots, plan.device.slot_bytes, kinds)
        return device, EmulatedLink(spec, moving(host, device))

    return wire


def showing(host: SlotArena, device: AliasArena) -> Callable[[Copy], None]:
    """Lands a copy by letting the device slot show the host slot."""

    def land(copy: Copy) -> None:
        device.views[copy.layer][copy.target] = host.views[copy.layer][copy.source]

    return land


def moving(host: SlotArena, device: SlotArena) -> Callable[[Copy], None]:
    """Lands a copy by moving its bytes."""

    def land(copy: Copy) -> None:
        source = host.buffer(copy.source, copy.size_bytes)
        device.buffer(copy.target, copy.size_bytes)[:] = source

    return land
