"""Two memories: a device's own, and the host's beside it. Plain arithmetic, as in memory.py."""

from dataclasses import dataclass

from moestro.cache import human_bytes
from moestro.engine.facts import GIB, MIB, BudgetTooSmall

# Beyond what a formula can name: kernels loaded when first used, workspaces of matrix products,
# what an allocator cannot join. Estimates: no GPU was here to measure them on.
DEVICE_ALLOWANCE_BYTES = 512 * MIB
HOST_ALLOWANCE_BYTES = 512 * MIB
HOST_RESERVE_SHARE = 0.15
PINNED_RESERVE_BYTES = 2 * GIB  # pinned memory is taken at once, and nothing swaps it out


@dataclass(frozen=True, slots=True)
class HostDemand:
    """What the host's memory is needed for when a model computes elsewhere."""

    interpreter_bytes: int  # resident now, the device's driver included
    experts_total_bytes: int
    experts_least_bytes: int  # staging included
    experts_wish_bytes: int  # more than that is not worth choosing; staging included
    staging_bytes: int
    packing_bytes: int  # taken at the start alone
    files_bytes: int = 0  # of cache and model, where their folders are memory (tmpfs)
    pinned: bool = False  # the experts, for a GPU to fetch them by itself
    dense_bytes: int = 0  # weights that are looked up here and not multiplied with

    @property
    def fixed_bytes(self) -> int:
        return self.interpreter_bytes + self.files_bytes + self.dense_bytes + HOST_ALLOWANCE_BYTES


@dataclass(frozen=True, slots=True)
class HostPlan:
    """The demand with the host tier's budget settled."""

    demand: HostDemand
    experts_bytes: int  # slots and staging
    limit_bytes: int
    limit_name: str
    available_bytes: int | None = None  # now, to this process; None: all of the limit

    @property
    def packing_excess_bytes(self) -> int:
        demand = self.demand
        packing = demand.interpreter_bytes + demand.files_bytes + demand.packing_bytes
        return max(0, packing - self.demand.fixed_bytes - self.experts_bytes)

    @property
    def total_bytes(self) -> int:
        return self.demand.fixed_bytes + self.experts_bytes + self.packing_excess_bytes

    def parts(self) -> dict[str, int]:
        """Bytes by part; they sum to the total."""
        return {
            "host_interpreter": self.demand.interpreter_bytes,
            "host_workspace": HOST_ALLOWANCE_BYTES,
            "host_experts": self.experts_bytes,
            "host_packing": self.packing_excess_bytes,
            **({"host_dense": self.demand.dense_bytes} if self.demand.dense_bytes else {}),
            **({"host_files": self.demand.files_bytes} if self.demand.files_bytes else {}),
        }

    @property
    def warning(self) -> str | None:
        """Of a tier that is pinned and takes more than others have left."""
        available = self.available_bytes
        if not self.demand.pinned or available is None or self.total_bytes <= available:
            return None
        return (
            f"the host's part pins more memory than there is now: {human_bytes(self.total_bytes)},"
            f" {human_bytes(available)} are available; nothing swaps pinned memory out, so the"
            " system may end programs: lower --host-memory or close some"
        )

    def lines(self) -> list[str]:
        demand = self.demand
        slots_bytes = self.experts_bytes - demand.staging_bytes
        share = min(100, 100 * slots_bytes // max(1, demand.experts_total_bytes))
        dense_bytes = demand.dense_bytes
        table = f" + embedding {human_bytes(dense_bytes)}" if dense_bytes else ""
        return [
            f"memory plan of the host: {human_bytes(self.total_bytes)} of"
            f" {human_bytes(self.limit_bytes)} ({self.limit_name})",
            f"  fixed     {human_bytes(demand.fixed_bytes):>10}  interpreter"
            f" {human_bytes(demand.interpreter_bytes)}{table} + workspace"
            f" {human_bytes(HOST_ALLOWANCE_BYTES)}",
            f"  experts   {human_bytes(self.experts_bytes):>10}  "
            f"{'pinned, ' if demand.pinned else ''}{share} % of"
            f" {human_bytes(demand.experts_total_bytes)} + staging"
            f" {human_bytes(demand.staging_bytes)} (--host-memory)",
            *files_line(demand.files_bytes),
            *self._packing_line(),
        ]

    def _packing_line(self) -> list[str]:
        if not self.packing_excess_bytes:
            return []
        return [
            f"  packing   {human_bytes(self.packing_excess_bytes):>10}  at the start alone, beyond"
            " the rest"
        ]


def files_line(files_bytes: int) -> list[str]:
    """What a plan says of files that are memory; nothing where there are none."""
    if not files_bytes:
        return []
    return [
        f"  files     {human_bytes(files_bytes):>10}  of the fixed part: files on tmpfs, which is"
        " memory; a --cache-dir on a disk takes none"
    ]


def settle_host(
    demand: HostDemand,
    host_memory_bytes: int | None,
    limit: tuple[int, str],
    available_bytes: int | None = None,
) -> HostPlan:
    """The host tier's budget where the user gave none, then the check.

    `available_bytes` as in memory.py. A budget that is given may exceed it, up to the limit: see
    `HostPlan.warning`. Raises BudgetTooSmall with the sums.
    """
    limit_bytes, limit_name = limit
    now_bytes = limit_bytes if available_bytes is None else min(limit_bytes, available_bytes)
    reserve_bytes = int(limit_bytes * HOST_RESERVE_SHARE)
    if demand.pinned:
        reserve_bytes = max(reserve_bytes, PINNED_RESERVE_BYTES)
    left = now_bytes - reserve_bytes - demand.fixed_bytes
    experts = host_memory_bytes
    if experts is None:
        experts = max(demand.experts_least_bytes, min(demand.experts_wish_bytes, left))
    experts = min(experts, demand.experts_total_bytes + demand.staging_bytes)
    plan = HostPlan(demand, experts, limit_bytes, limit_name, available_bytes)
    if plan.total_bytes > limit_bytes:
        room = (limit_bytes - demand.fixed_bytes) // MIB
        raise BudgetTooSmall(
            f"the host's part needs {human_bytes(plan.total_bytes)} (fixed"
            f" {human_bytes(demand.fixed_bytes)} + experts {human_bytes(experts)} + packing"
            f" {human_bytes(plan.packing_excess_bytes)}), {limit_name} is"
            f" {human_bytes(limit_bytes)}; --host-memory {max(0, room)}MiB is the most"
        )
    return plan
