"""Puts the tiers together: device slots <- host slots <- pack."""

from moestro.cache.facts import TierPlan
from moestro.cache.pack import Pack
from moestro.cache.policy import HostResidency, NextUse, Policy, SlotTable
from moestro.cache.tiers import (
    PackReader,
    SlotArena,
    TierReader,
    Wiring,
    pack_reader,
)

from .expert_cache import ExpertCache


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
    disk = pack_reader(pack) if disk is None else disk
    reader = TierReader(pack, plan.host, host, residency, disk, link)
    return ExpertCache(pack, plan.device, policy=policy, reader=reader, arena=arena, table=table)
