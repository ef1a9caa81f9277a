"""Puts the tiers together: device slots <- host slots <- pack, or host slots <- pack alone."""

from collections.abc import Callable

from .expert_cache import ExpertCache
from .frequency import NextUse
from .host import TierReader
from .host_residency import HostResidency
from .link import Copy, EmulatedLink, Link, LinkSpec
from .pack import Pack
from .plan import HostMode, TierPlan
from .policy import Policy
from .slots import AliasArena, Arena, SlotArena
from .table import SlotTable
from .transfer import DISK_READERS, DirectReader, PackReader

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


def two_tiers(
    pack: Pack,
    plan: TierPlan,
    wiring: Wiring,
    *,
    policy: Policy | None = None,
    host_policy: Policy | None = None,
    disk: PackReader | None = None,
) -> ExpertCache:
    """The cache of a device whose slots are filled from host slots; it owns all of it."""
    assert plan.device is not None and plan.mode is not None, "a plan of two tiers"
    kinds = [layer.kinds for layer in pack.spec.layers]
    experts = [layer.num_experts for layer in pack.spec.layers]
    host = SlotArena(plan.host.slots, plan.host.slot_bytes, kinds)
    arena, link = wiring(host)
    table = SlotTable(plan.device.slots, experts)
    residency = HostResidency(
        SlotTable(plan.host.slots, experts),
        table,
        NextUse() if host_policy is None else host_policy,
        plan.mode,
    )
    disk = DirectReader(pack, DISK_READERS) if disk is None else disk
    reader = TierReader(pack, plan.host, host, residency, disk, link)
    return ExpertCache(pack, plan.device, policy=policy, reader=reader, arena=arena, table=table)
