"""The cache of a GPU over an imagined one: what its race detector sees, it judges.

What a lease lends is computed with in virtual time, long after the lease ended: a kernel for each
expert looks at its bytes when its time has come.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_memory import Region
from fake_cuda_torch import installed
from manual_reader import ManualReader
from moestro.cache import HostMode, Pack, Policy, ReadRequest, TierPlan, plan_slots, two_tiers
from moestro.cache.tiers.cuda_link import CudaArena, CudaLink
from moestro.cache.tiers.slots import Arena, SlotArena
from rigs import Key, Notes
from tiny_packs import assert_is

SLOW = Gpu(copy_bytes_per_s=4096 / 100e-6, call_s=0.0, kernel_s=250e-6)
"""A small expert takes 100 us to cross. Time turns only where somebody waits."""


class NotedReader(ManualReader):
    """Tells what it writes into host slots, and when they may not be read."""

    def __init__(self, cuda: FakeCuda, pack: Pack, choose: Callable[[int], int]) -> None:
        super().__init__(pack, choose, cuda.sleep)
        self._cuda = cuda

    def submit(self, requests: Sequence[ReadRequest]) -> None:
        for request in requests:
            self._note(request, "the beginning of a read", garbage=True)
        super().submit(requests)

    def finish(self, index: int = 0) -> None:
        request, garbage = self.queued[index], bool(self.failures)
        self._note(request, "a read", garbage=garbage)
        super().finish(index)

    def _note(self, request: ReadRequest, what: str, *, garbage: bool) -> None:
        for expert, buffer in zip(request.experts, request.buffers, strict=True):
            name = f"{what} of {request.layer}, {expert}"
            self._cuda.host_wrote(buffer, name, garbage=garbage)


class OnGpu:
    """Device slots <- host slots <- pack, as `cuda` wires them."""

    arena: CudaArena
    link: CudaLink

    def __init__(
        self,
        pack: Pack,
        slots: int,
        host_slots: int,
        mode: HostMode,
        policy: Policy,
        host_policy: Policy,
        choose: Callable[[int], int] = lambda count: 0,
        gpu: Gpu = SLOW,
        arena: type[CudaArena] = CudaArena,
        link: type[CudaLink] = CudaLink,
    ) -> None:
        self.cuda, self._types = FakeCuda(gpu), (arena, link)
        self._pack, self.notes = pack, Notes()
        self._landed: dict[int, int] = {}  # bytes, by device slot
        self._seen = 0
        spec = pack.spec
        host_slots = spec.num_experts if mode is HostMode.WHOLE else host_slots
        host = plan_slots(host_slots * spec.slot_bytes, spec, 1)
        self._plan = TierPlan(host, plan_slots(slots * spec.slot_bytes, spec, 1), mode)
        self.disk = NotedReader(self.cuda, pack, choose)
        self.failures = self.disk.failures
        with ExitStack() as stack:
            stack.enter_context(installed(self.cuda))
            self.cache = two_tiers(
                pack,
                self._plan,
                self._wire,
                policy=policy,
                host_policy=host_policy,
                disk=self.disk,
            )
            self._stack = stack.pop_all()
        assert self.cache._host is not None
        self.host = self.cache._host
        self._submit = self.host.submit
        self.host.submit = self._noted  # type: ignore[method-assign]

    def close(self) -> None:
        with self._stack:
            self.cache.close()

    def look(self, tensors: Mapping[str, torch.Tensor], layer: int, expert: int) -> None:
        """Computes with an expert: on the device later, on the host now."""
        check = partial(assert_is, tensors, self._pack.spec, layer, expert)
        given = list(tensors.values())
        if self.cuda.on_device(given[0]):
            self.cuda.kernel(f"compute {layer}, {expert}", given, run=check)
        else:
            check()

    def here(self) -> set[Key]:
        self._take_notes()
        return set(self.notes.holds.values())

    @property
    def moving(self) -> int:
        """Reads that may end, and the clock that may turn."""
        busy = any(queue.operations for queue in self.cuda.timeline.queues)
        return len(self.disk.queued) + busy

    def end(self, choice: int) -> None:
        if choice < len(self.disk.queued):
            self.disk.finish(choice)
        else:
            self.cuda.timeline.turn(80e-6)

    def _wire(self, host: SlotArena) -> tuple[Arena, CudaLink]:
        assert self._plan.device is not None
        kinds = [layer.kinds for layer in self._pack.spec.layers]
        arena, link = self._types
        device = self._plan.device
        self.arena = arena(device.slots, device.slot_bytes, kinds, self.cuda.device)
        self.link = link(host, self.arena)
        return self.arena, self.link

    def _noted(self, requests: Sequence[ReadRequest]) -> None:
        self._take_notes()
        self.notes.expect(requests)
        for request in requests:
            self._landed.update(dict.fromkeys(request.slots, 0))
        self._submit(requests)

    def _take_notes(self) -> None:
        """Of copies that ended: a slot whose bytes have all landed holds its expert."""
        region, ended = self.cuda.region(self.arena.flat), self.cuda.timeline.ended
        assert isinstance(region, Region)
        for operation in ended[self._seen :]:
            for span in operation.writes:
                if span.region is not region:
                    continue
                slot = span.start // self.arena.slot_bytes
                self._landed[slot] += span.end - span.start
                layer, expert = self.notes.wanted[slot][slot]
                if self._landed[slot] == self._pack.spec.layers[layer].strides[expert]:
                    self.notes.land(slot)
        self._seen = len(ended)
