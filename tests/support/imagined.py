"""A device that is only imagined: memory of its own on paper, tensors on the CPU.

What a GPU runs, but for its kernels: the plan of two memories, host slots, a link and an arena
apart, another compute dtype.
"""

from collections.abc import Callable
from functools import partial

import torch

from moestro.cache import LinkSpec, Pack, TierPlan, Wiring
from moestro.cache.tiers.link import EmulatedLink
from moestro.cache.tiers.slots import Arena, SlotArena
from moestro.cache.tiers.wiring import moving
from moestro.engine import EngineConfig
from moestro.engine.facts.device import CPU, Device, Room

GIB = 1 << 30
FAST = LinkSpec(1e10, 1e-6)


def imagined(
    dtype: torch.dtype = torch.float32, free_bytes: int = 4 * GIB, staging_bytes: int = 0
) -> Callable[[EngineConfig], Device]:
    """For `load`: a device with so much free memory, whatever the config asks for."""
    room = Room("an imagined device", free_bytes, 2 * free_bytes)
    place = torch.device("cpu")
    device = Device(place, dtype, "imagined", room, partial(_wire, FAST), staging_bytes)
    return lambda _: device


def _wire(spec: LinkSpec, pack: Pack, plan: TierPlan) -> Wiring:
    def wire(host: SlotArena) -> tuple[Arena, EmulatedLink]:
        assert plan.device is not None
        kinds = [layer.kinds for layer in pack.spec.layers]
        arena = SlotArena(plan.device.slots, plan.device.slot_bytes, kinds)
        return arena, EmulatedLink(spec, moving(host, arena))

    return wire


def nothing(_: EngineConfig) -> Device:
    """What `--device auto` finds on a machine without a GPU."""
    return CPU
