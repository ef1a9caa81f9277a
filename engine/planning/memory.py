"""The memory plan: what each part takes, before any of it is taken. Plain arithmetic.

The fixed part (interpreter, dense weights, workspace) follows from the model; the two budgets
(experts, KV) are the user's, or what is left. The sum is a promise: the process stays below it.
"""

import ctypes
import gc
from dataclasses import dataclass

from moestro.cache import human_bytes
from moestro.engine.facts import GIB, MIB, PAGE_TOKENS, BudgetTooSmall, round_up_tokens

from .device_memory import HostPlan, files_line

# What torch, its threads and the allocator take beyond what a formula can name: 60-100 MiB seen.
ALLOWANCE_BYTES = 96 * MIB
# Left alone when a budget is chosen here: the rest of the machine lives from it.
RESERVE_SHARE = 0.15
MARGIN_SHARE = 0.10  # the same, of what is free on a device
LEAST_KV_TOKENS = 64  # a shorter context answers nothing
DEFAULT_KV_BYTES = GIB
LEAST_STEP_TOKENS = 512  # of one step, where nothing else is wanted: some rows for each expert


@dataclass(frozen=True, slots=True)
class BudgetKind:
    """Of the experts that a model computes from."""

    flag: str
    reserve_share: float  # left alone when it is chosen here


HOST_BUDGET = BudgetKind("--host-memory", RESERVE_SHARE)
DEVICE_BUDGET = BudgetKind("--device-memory", MARGIN_SHARE)


@dataclass(frozen=True, slots=True)
class Demand:
    """What the model asks for, whatever the budgets are."""

    interpreter_bytes: int  # resident now, before the model
    dense_bytes: int
    workspace_bytes: int
    experts_total_bytes: int  # all experts at once
    experts_least_bytes: int  # what one step must hold
    kv_bytes_per_token: int
    context_tokens: int  # the longest sequence asked for
    files_bytes: int = 0  # of cache and model, where their folders are memory (tmpfs)
    packing_bytes: int = 0  # taken once, at the start: one layer of experts, or one tensor, twice
    step_tokens: int = LEAST_STEP_TOKENS  # the most in one step; they make the workspace
    host_dense_bytes: int = 0  # of dense weights that a device of its own leaves to the host

    @property
    def fixed_bytes(self) -> int:
        return self.interpreter_bytes + self.dense_bytes + self.workspace_bytes + self.files_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The demand with both budgets settled, in the memory that the model computes from."""

    demand: Demand
    experts_bytes: int
    kv_bytes: int
    limit_bytes: int
    limit_name: str
    device_bytes: int = 0  # slots of an emulated device that are memory of their own
    step_reason: str = ""  # why a step has so many tokens
    host: HostPlan | None = None  # beside it, where that is a device's own memory

    @property
    def serving_bytes(self) -> int:
        return self.demand.fixed_bytes + self.experts_bytes + self.device_bytes + self.kv_bytes

    @property
    def packing_excess_bytes(self) -> int:
        """What packing takes beyond what serving will."""
        demand = self.demand
        packing = demand.interpreter_bytes + demand.files_bytes + demand.packing_bytes
        return max(0, packing - self.serving_bytes)

    @property
    def total_bytes(self) -> int:
        return self.serving_bytes + self.packing_excess_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that can be reserved: whole rounds only, as admission reserves them."""
        tokens = self.kv_bytes // self.demand.kv_bytes_per_token
        return tokens // PAGE_TOKENS * PAGE_TOKENS

    @property
    def longest_tokens(self) -> int:
        """The longest sequence that will be served."""
        return min(self.demand.context_tokens, self.kv_tokens)

    def parts(self) -> dict[str, int]:
        """Bytes by part; they sum to the total (with the host's, where it is apart)."""
        if self.host is not None:
            return self._apart() | self.host.parts()
        device = {"device": self.device_bytes} if self.device_bytes else {}
        files = {"files": self.demand.files_bytes} if self.demand.files_bytes else {}
        return {
            "interpreter": self.demand.interpreter_bytes,
            "dense": self.demand.dense_bytes,
            "workspace": self.demand.workspace_bytes,
            "experts": self.experts_bytes,
            **device,
            **files,
            "kv": self.kv_bytes,
            "packing": self.packing_excess_bytes,
        }

    def _apart(self) -> dict[str, int]:
        return {
            "device_dense": self.demand.dense_bytes,
            "device_workspace": self.demand.workspace_bytes,
            "device_experts": self.experts_bytes,
            "device_kv": self.kv_bytes,
            "device_packing": self.packing_excess_bytes,
        }

    def lines(self) -> list[str]:
        """The plan as the start prints it."""
        demand, host = self.demand, self.host
        of, flag = ("", "--host-memory") if host is None else (" of the device", "--device-memory")
        interpreter = f"interpreter {human_bytes(demand.interpreter_bytes)} + " if not host else ""
        share = min(100, 100 * self.experts_bytes // max(1, demand.experts_total_bytes))
        return [
            f"memory plan{of}: {human_bytes(self.total_bytes)} of {human_bytes(self.limit_bytes)}"
            f" ({self.limit_name})",
            f"  fixed     {human_bytes(demand.fixed_bytes):>10}  {interpreter}dense weights"
            f" {human_bytes(demand.dense_bytes)} + workspace {human_bytes(demand.workspace_bytes)}",
            f"  experts   {human_bytes(self.experts_bytes):>10}  {share} % of"
            f" {human_bytes(demand.experts_total_bytes)} ({flag})",
            *self._device_line(),
            *files_line(self.demand.files_bytes),
            f"  kv        {human_bytes(self.kv_bytes):>10}  {self.kv_tokens} tokens of"
            f" {human_bytes(demand.kv_bytes_per_token)} (--kv-memory)",
            f"  step      {demand.step_tokens:>10}  tokens (--max-step-tokens): {self.step_reason}",
            *self._packing_line(),
            *(host.lines() if host else ()),
        ]

    def _device_line(self) -> list[str]:
        if not self.device_bytes:
            return []
        return [
            f"  device    {human_bytes(self.device_bytes):>10}  emulated: slots of host memory, too"
            " (--device-memory)"
        ]

    def _packing_line(self) -> list[str]:
        if not self.packing_excess_bytes:
            return []
        return [
            f"  packing   {human_bytes(self.packing_excess_bytes):>10}  at the start alone, beyond"
            f" the rest: what is converted takes {human_bytes(self.demand.packing_bytes)} at once"
        ]


def release_freed_memory() -> None:
    """Give pages that were freed back to the system, so that what is resident is what is used."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """The same without a collection of garbage: milliseconds, for inside long work."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: its own allocator decides
        return


def settle(
    demand: Demand,
    host_memory_bytes: int | None,
    kv_memory_bytes: int | None,
    limit: tuple[int, str],
    device_bytes: int = 0,
    kind: BudgetKind = HOST_BUDGET,
    available_bytes: int | None = None,
) -> MemoryPlan:
    """Budgets where the user gave none, then the check. Raises BudgetTooSmall with the sums.

    Room beyond all experts is not planned: nothing would ever take it. `device_bytes` are an
    emulated device's slots, where they lie in the same memory. `kind` says
    which budget the first one is. A budget that is chosen here takes no more than
    `available_bytes`, which this process has or could have now; others hold the rest.
    """
    limit_bytes, limit_name = limit
    taken = demand.fixed_bytes + device_bytes
    now_bytes = limit_bytes if available_bytes is None else min(limit_bytes, available_bytes)
    left = now_bytes - int(limit_bytes * kind.reserve_share) - taken
    least_kv = LEAST_KV_TOKENS * demand.kv_bytes_per_token
    kv = kv_memory_bytes
    if kv is None:
        whole = round_up_tokens(demand.context_tokens) * demand.kv_bytes_per_token
        room = now_bytes - taken - demand.experts_least_bytes
        kv = max(least_kv, min(whole, DEFAULT_KV_BYTES, left // 2, room))
    experts = host_memory_bytes
    if experts is None:
        experts = max(demand.experts_least_bytes, left - kv)
    experts = min(experts, demand.experts_total_bytes)
    plan = MemoryPlan(demand, experts, kv, limit_bytes, limit_name, device_bytes)
    if kv < least_kv:
        raise BudgetTooSmall(
            f"--kv-memory {human_bytes(kv)} is too small: the least is {LEAST_KV_TOKENS} tokens of"
            f" {human_bytes(demand.kv_bytes_per_token)}, {human_bytes(least_kv)}"
        )
    if plan.total_bytes > limit_bytes:
        raise BudgetTooSmall(_too_large(plan, kv_memory_bytes is not None, kind.flag))
    return plan


def _too_large(plan: MemoryPlan, kv_is_given: bool, flag: str) -> str:
    """The sums, and what to change; or what the model needs at the least, where nothing helps."""
    demand, limit = plan.demand, f"{plan.limit_name} is {human_bytes(plan.limit_bytes)}"
    fixed = f"fixed {human_bytes(demand.fixed_bytes)}"
    if plan.device_bytes:
        fixed += f" + emulated device {human_bytes(plan.device_bytes)}"
    least = demand.fixed_bytes + plan.device_bytes + demand.experts_least_bytes + plan.kv_bytes
    if least > plan.limit_bytes and not kv_is_given:
        return (
            f"the model needs at least {human_bytes(least)} ({fixed} + experts of one token"
            f" {human_bytes(demand.experts_least_bytes)} + kv of {plan.kv_tokens} tokens"
            f" {human_bytes(plan.kv_bytes)}), {limit}"
        )
    experts_room = plan.limit_bytes - demand.fixed_bytes - plan.device_bytes - plan.kv_bytes
    return (
        f"the plan needs {human_bytes(plan.total_bytes)} ({fixed} + experts"
        f" {human_bytes(plan.experts_bytes)} + kv {human_bytes(plan.kv_bytes)} + packing"
        f" {human_bytes(plan.packing_excess_bytes)}), {limit};"
    ) + (
        f" {flag} {experts_room // MIB}MiB would fit"
        if least <= plan.limit_bytes
        else f" the least that works with this --kv-memory is {human_bytes(least)}"
    )
