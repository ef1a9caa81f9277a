"""The host tier: fills device slots from host slots, and these from the pack.

    request -> experts here:      copied at once
               experts missing:   take a host slot, are read, then copied
               no host slot free: wait until a copy or a read ends (demanded before guessed)

To the device's cache it is a reader like any other. One thread calls it and keeps all its counts;
only the pack's reader has threads. Knows no device: the link does.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from moestro.cache.facts import ExpertKey, SlotPlan, TierStats
from moestro.cache.pack import Pack, TensorViews
from moestro.cache.policy import NOWHERE, HostResidency, LinkCounters, agree

from .link import Copied, Copy, Link
from .slots import SlotArena
from .speed import time_reads
from .transfer import MOST_BYTES_AT_ONCE, Completion, Failure, PackReader, ReadRequest, runs_of


@dataclass(slots=True, eq=False)
class _Job:
    """One request of the device's cache; completed when `left` is 0."""

    request: ReadRequest
    left: int
    busy_s: float = 0.0
    error: Failure | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """One expert of a job."""

    job: _Job
    key: ExpertKey
    target: int  # device slot

    @property
    def guessed(self) -> bool:
        return self.job.request.guessed


@dataclass(slots=True)
class _Counts:
    """hits + misses = experts asked for; misses = reads started + joined + waiting."""

    asked: int = 0
    hits: int = 0
    misses: int = 0
    joined: int = 0  # missed while another request had them read
    demand: LinkCounters = field(default_factory=LinkCounters)  # reads from the pack
    prefetch: LinkCounters = field(default_factory=LinkCounters)
    copies: int = 0  # handed to the link
    copied: int = 0

    def of(self, request: ReadRequest) -> LinkCounters:
        return self.prefetch if request.guessed else self.demand


class TierReader:
    """A Reader (transfer.py) over host slots, the pack's reader and a link; owns all three."""

    def __init__(
        self,
        pack: Pack,
        plan: SlotPlan,
        arena: SlotArena,
        residency: HostResidency,
        disk: PackReader,
        link: Link,
    ) -> None:
        self._pack, self._plan, self._arena = pack, plan, arena
        self._residency, self._table = residency, residency.table
        self._disk, self._link = disk, link
        self._layers = pack.spec.layers
        self._counts = _Counts()
        self._backlog: tuple[deque[_Task], deque[_Task]] = (deque(), deque())  # demanded, guessed
        self._reading: list[ReadRequest] = []
        self._awaiting: dict[ExpertKey, list[_Task]] = {}  # tasks by the expert being read
        self._copying: dict[Copy, _Task] = {}
        self._completed: list[Completion] = []
        self._lent: tuple[int, list[int]] | None = None  # of the event that is being submitted

    def submit(self, requests: Sequence[ReadRequest]) -> None:
        here, counts, table = list[_Task](), self._counts, self._table
        for layer, of_layer in groupby(requests, lambda request: request.layer):
            distinct = dict.fromkeys(x for request in of_layer for x in request.experts)
            if self._lent is not None and self._lent[0] == layer:
                distinct |= dict.fromkeys(self._lent[1])
                self._lent = None
            self._residency.asked(layer, list(distinct))
        for request in requests:
            job = _Job(request, len(request.slots))
            for expert, target in zip(request.experts, request.slots, strict=True):
                task = _Task(job, self._residency.keys[request.layer][expert], target)
                slot = table.where[request.layer][expert]
                if slot != NOWHERE and table.ready[slot]:
                    here.append(task)
                else:
                    self._backlog[request.guessed].append(task)
            counts.asked += len(request.slots)
        counts.hits += len(here)
        counts.misses += sum(len(request.slots) for request in requests) - len(here)
        self._copy(here)
        self._serve_backlog()

    def resident(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of `experts` that are in a host slot and can be lent, in this order.

        One slot is never lent: whoever else is missing comes through it.
        """
        row, ready = self._table.where[layer], self._table.ready
        here = [expert for expert in experts if row[expert] != NOWHERE and ready[row[expert]]]
        return here[: self._plan.slots - 1]

    def lend(self, layer: int, experts: Sequence[int], *, alone: bool) -> list[TensorViews]:
        """Views of `experts`, all resident, valid until `give_back`: to be computed with here.

        Not `alone`: the rest of the same layer event is submitted next, and both are one event for
        the policy.
        """
        row, views = self._table.where[layer], self._arena.views[layer]
        slots = [row[expert] for expert in experts]
        for slot in slots:
            self._residency.lend(slot)
        self._counts.asked += len(slots)
        self._counts.hits += len(slots)
        self._lent = (layer, list(experts))
        if alone:
            self._residency.asked(*self._lent)
            self._lent = None
        return [views[slot] for slot in slots]

    def give_back(self) -> None:
        """What was lent is not used any more."""
        if self._lent is not None:  # nothing of the event was submitted
            self._residency.asked(*self._lent)
            self._lent = None
        self._residency.give_back()

    def poll(self) -> list[Completion]:
        self._settle(self._disk.poll(), self._link.poll())
        return self._take()

    def wait(self) -> list[Completion]:
        while not self._completed:
            if self._reading and self._copying:
                # Whatever ends first: what was read has its copy to begin with.
                self._settle(self._disk.wait_at_most(self._link.due_s()), self._link.poll())
            elif self._copying:
                self._settle((), self._link.wait())
            else:
                self._settle(self._disk.wait(), ())
        return self._take()

    def close(self) -> None:
        self._link.close()
        self._disk.close()

    def time_fills(self, most_s: float) -> list[float]:
        """Seconds that filling one device slot takes: a copy, and a read where not all fit here.

        Raises ReadFailed.
        """
        copy_s = self._link.copy_s(self._plan.slot_bytes)
        if self._plan.holds_all:
            return [copy_s]
        return [copy_s + read_s for read_s in time_reads(self._pack, most_s)]

    def stats(self) -> TierStats:
        counts, plan = self._counts, self._plan
        return TierStats(
            mode=self._residency.mode.value,
            hits=counts.hits,
            misses=counts.misses,
            evictions=self._residency.evictions,
            demand_reads=counts.demand.loads,
            prefetch_reads=counts.prefetch.loads,
            demand_bytes=counts.demand.bytes,
            prefetch_bytes=counts.prefetch.bytes,
            demand_read_s=counts.demand.read_s,
            prefetch_read_s=counts.prefetch.read_s,
            slots=plan.slots,
            slots_used=self._table.used,
            slot_bytes=plan.slot_bytes,
            capacity_bytes=plan.capacity_bytes,
            used_bytes=self._table.used * plan.slot_bytes + plan.staging_bytes,
            link=self._link.stats(),
        )

    def check(self) -> None:
        """Raises AssertionError, with the sums, where two views of the truth differ."""
        table = self._table
        self._residency.check()
        reading = {slot for request in self._reading for slot in request.slots}
        agree("host slots being read into, LOADING host slots", reading, table.loading)
        awaited = {table.where[key.layer][key.expert] for key in self._awaiting}
        agree("host slots that tasks wait for, LOADING host slots", awaited, table.loading)
        sources = dict[int, int]()
        for copy, task in self._copying.items():
            sources[copy.source] = sources.get(copy.source, 0) + 1
            agree("expert in a copy's source, expert copied", table.keys[copy.source], task.key)
        agree("copies by source, pins by source", sources, self._residency.copies())
        self._check_books()

    def _check_books(self) -> None:
        counts, waiting = self._counts, sum(map(len, self._backlog))
        disk = (counts.demand, counts.prefetch)
        agree(
            "hits + misses of the host tier, asked for", counts.hits + counts.misses, counts.asked
        )
        accounted = sum(reads.started for reads in disk) + counts.joined + waiting
        agree("host misses, reads started + joined + waiting", counts.misses, accounted)
        moving = sum(reads.moving for reads in disk)
        agree("host reads moving, LOADING host slots", moving, len(self._table.loading))
        ready = sum(reads.loads for reads in disk) - self._residency.evictions
        agree("host reads - evictions, READY host slots", ready, sum(self._table.ready))
        agree(
            "copies under way, those of the counts",
            len(self._copying),
            counts.copies - counts.copied,
        )
        link = self._link.stats()
        agree("copies that ended, those of the link", counts.copied <= link.copies, True)
        idle = bool(waiting) and not self._reading and not self._copying
        agree("experts waiting for a host slot while all are idle, none", idle, False)

    def _take(self) -> list[Completion]:
        completed, self._completed = self._completed, []
        return completed

    def _copy(self, tasks: Iterable[_Task]) -> None:
        """Hands the link all of `tasks`, whose experts are here, at once."""
        copies = []
        for task in tasks:
            layer, expert = task.key
            source = self._table.where[layer][expert]
            self._residency.pin(source)
            size_bytes = self._layers[layer].strides[expert]
            copy = Copy(layer, source, task.target, size_bytes, task.guessed)
            self._copying[copy] = task
            copies.append(copy)
        if copies:
            self._counts.copies += len(copies)
            self._link.submit(copies)

    def _serve_backlog(self) -> None:
        """Gives host slots to those who wait for one, as far as there are any, and reads."""
        requests = list[ReadRequest]()
        for queue in self._backlog:
            here, fresh, row = list[_Task](), list[int](), self._table.where
            room = self._residency.make_room(len(queue)) if queue else 0
            while queue:
                key = queue[0].key
                slot = row[key.layer][key.expert]
                if slot != NOWHERE:  # another request has had it read
                    self._counts.joined += 1
                elif not room:
                    break
                else:
                    room -= 1
                    slot = self._residency.take(key)
                    fresh.append(slot)
                    self._awaiting[key] = []
                task = queue.popleft()
                (here if self._table.ready[slot] else self._awaiting[key]).append(task)
            requests += self._requests(fresh, guessed=queue is self._backlog[1])
            self._copy(here)  # which pins their slots, before the other queue makes room
            if queue:
                break
        if requests:
            self._reading += requests
            for request in requests:
                self._counts.of(request).started += len(request.slots)
            self._disk.submit(requests)

    def _requests(self, slots: Sequence[int], *, guessed: bool) -> Iterator[ReadRequest]:
        """Reads that fill `slots` with whom they were given to, neighbours in one."""
        table = self._table
        given = sorted((key, slot) for slot in slots if (key := table.keys[slot]) is not None)
        for layer, group in groupby(given, lambda pair: pair[0].layer):
            whole = self._layers[layer]
            slot_of = {key.expert: slot for key, slot in group}
            most = max(1, MOST_BYTES_AT_ONCE // whole.layout.stride_bytes)
            for run in runs_of(list(slot_of), most):
                into = tuple(slot_of[expert] for expert in run)
                for expert, slot in zip(run if whole.each else (), into, strict=False):
                    self._arena.show(layer, slot, whole.each[expert])
                buffers = self._arena.buffers(into, whole.strides[run.start : run.stop])
                yield ReadRequest(layer, run, into, buffers, guessed)

    def _settle(self, read: Iterable[Completion], copied: Iterable[Copied]) -> None:
        """Takes note of what ended, and starts what that makes possible."""
        ended = False
        for copied_one in copied:
            task = self._copying.pop(copied_one.copy)
            self._residency.unpin(copied_one.copy.source)
            self._counts.copied += 1
            task.job.busy_s += copied_one.busy_s
            self._finish(task)
            ended = True
        here = list[_Task]()
        for completion in read:
            here += self._arrived(completion)
            ended = True
        self._copy(here)
        if ended and any(self._backlog):
            self._serve_backlog()

    def _arrived(self, completion: Completion) -> Iterator[_Task]:
        """A read from the pack ended: the tasks whose copy can begin."""
        request, error = completion.request, completion.error
        self._reading.remove(request)
        reads = self._counts.of(request)
        reads.read_s += completion.read_s
        for expert, slot in zip(request.experts, request.slots, strict=True):
            tasks = self._awaiting.pop(self._residency.keys[request.layer][expert])
            if error is None:
                self._table.arrived([slot])
                self._pack.proved(request.layer, [expert])
                reads.loads += 1
                reads.bytes += self._layers[request.layer].strides[expert]
                yield from tasks
                continue
            self._residency.failed(slot)
            reads.failed += 1
            for task in tasks:
                task.job.error = error
                self._finish(task)

    def _finish(self, task: _Task) -> None:
        """One expert of a job came or failed; the job ends with its last one."""
        job = task.job
        job.left -= 1
        if not job.left:
            self._completed.append(Completion(job.request, job.busy_s, job.error))
