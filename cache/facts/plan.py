"""Bytes to slots: how many experts fit. Pure arithmetic, before anything is allocated."""

from dataclasses import dataclass
from enum import Enum

from .errors import DoesNotFit
from .layout import PackSpec
from .units import human_bytes


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a user may set about the cache."""

    capacity_bytes: int  # slots and staging together; never exceeded
    readers: int = 1  # threads that read the pack; more than one pays on fast disks only
    staging_bytes: int = 0  # set aside for a transfer that cannot read into slots directly

    def __post_init__(self) -> None:
        if self.readers < 1:
            raise ValueError(f"readers must be at least 1, not {self.readers}")
        if min(self.capacity_bytes, self.staging_bytes) < 0:
            raise ValueError("budgets are not negative")


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """A budget divided. Memory is touched slot by slot, so small loads stay below `used_bytes`."""

    capacity_bytes: int
    staging_bytes: int
    slots: int
    slot_bytes: int  # stride of the largest blob; smaller ones leave the rest of a slot unused
    total_experts: int  # of the model

    @property
    def arena_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def used_bytes(self) -> int:
        return self.arena_bytes + self.staging_bytes

    @property
    def holds_all(self) -> bool:
        """Every expert has a slot: after the first use of each, nothing is read again."""
        return self.slots >= self.total_experts

    def __str__(self) -> str:
        share = "all" if self.holds_all else f"{100 * self.slots // self.total_experts} %"
        return (
            f"{self.slots} slots of {human_bytes(self.slot_bytes)} for {self.total_experts} "
            f"experts ({share}), {human_bytes(self.used_bytes)} of "
            f"{human_bytes(self.capacity_bytes)}"
        )


def plan_slots(
    capacity_bytes: int, spec: PackSpec, min_slots: int, staging_bytes: int = 0
) -> SlotPlan:
    """Fills `capacity_bytes` with as many slots as fit, never more than there are experts.

    Raises DoesNotFit when fewer than `min_slots` (or none at all) would fit; the message has the
    sums and `needed_bytes` is the smallest capacity that works.
    """
    slot_bytes, total = spec.slot_bytes, spec.num_experts
    wanted = max(1, min(min_slots, total))
    slots = min(total, max(0, capacity_bytes - staging_bytes) // slot_bytes)
    if slots < wanted:
        needed = wanted * slot_bytes + staging_bytes
        staging = f" + {human_bytes(staging_bytes)} staging" if staging_bytes else ""
        raise DoesNotFit(
            f"{human_bytes(capacity_bytes)} for experts is too small: it holds {slots} experts of "
            f"{human_bytes(slot_bytes)}{staging}, but {wanted} must fit at once "
            f"({wanted} x {human_bytes(slot_bytes)}{staging}): the smallest value that works is "
            f"{human_bytes(needed)} ({needed} bytes)",
            needed,
        )
    return SlotPlan(capacity_bytes, staging_bytes, slots, slot_bytes, total)


class HostMode(Enum):
    """What the host tier, between the device's slots and the pack, keeps."""

    WHOLE = "whole"  # every expert, once it was read: nobody ever leaves
    EXCLUSIVE = "exclusive"  # whoever the device has leaves first: more experts in both together
    INCLUSIVE = "inclusive"  # whoever the policy prefers; never better, here to be measured against


LEAST_HOST_SLOTS = 2
"""One is read into while the other one is copied from."""


@dataclass(frozen=True, slots=True)
class TierPlan:
    """Both budgets divided. Without a device tier, the host's slots are what is computed from."""

    host: SlotPlan
    device: SlotPlan | None = None
    mode: HostMode | None = None  # None without a device tier

    def __str__(self) -> str:
        if self.device is None or self.mode is None:
            return str(self.host)
        return f"device: {self.device}; host ({self.mode.value}): {self.host}"


def plan_tiers(
    device_bytes: int | None,
    host_bytes: int,
    spec: PackSpec,
    min_slots: int,
    staging_bytes: int = 0,
) -> TierPlan:
    """Divides both budgets. `min_slots` is what one step needs where it computes.

    `staging_bytes` are the host tier's. The host keeps all experts if they fit; else it gives up
    first what the device has, which reads less from the pack for every pair of budgets that was
    tried (tests/bench/bench_tiers.py). Raises DoesNotFit, like `plan_slots`; the message begins
    with the budget's name where there are two.
    """
    if device_bytes is None:
        return TierPlan(plan_slots(host_bytes, spec, min_slots, staging_bytes))
    device = _named("the device", device_bytes, spec, min_slots, 0)
    host = _named("the host tier", host_bytes, spec, LEAST_HOST_SLOTS, staging_bytes)
    return TierPlan(host, device, HostMode.WHOLE if host.holds_all else HostMode.EXCLUSIVE)


def _named(
    tier: str, capacity_bytes: int, spec: PackSpec, min_slots: int, staging_bytes: int
) -> SlotPlan:
    try:
        return plan_slots(capacity_bytes, spec, min_slots, staging_bytes)
    except DoesNotFit as error:
        raise DoesNotFit(f"{tier}: {error}", error.needed_bytes) from error
