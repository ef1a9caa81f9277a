"""How many tokens one step may take. Plain arithmetic over plans; measures nothing.

A step moves every missing expert of a layer once, however many of its tokens ask for it: a prompt
in steps of twice the tokens moves half the bytes. It costs workspace that experts could have, and
the time of everyone who decodes: a step is not interrupted.
"""

from collections.abc import Callable
from dataclasses import replace

from moestro.cache import human_bytes
from moestro.engine.facts import BudgetTooSmall

from .memory import LEAST_STEP_TOKENS, MemoryPlan

# At 2048 a quarter of what steps of 512 move is left. Twice as many tokens would save an eighth at
# the most, and running answers would wait eight times as long as for a step of 512.
LARGER_TOKENS = (1024, 2048)
WORKSPACE_SHARE = 0.05  # of the experts' budget: what a larger step may take beyond the least one


def plan_given_steps(plan: Callable[[int], MemoryPlan], tokens: int) -> MemoryPlan:
    """`plan` of the number of tokens that the user wants. Raises BudgetTooSmall."""
    try:
        return replace(plan(tokens), step_reason="as given")
    except BudgetTooSmall as error:
        if tokens <= LEAST_STEP_TOKENS:
            raise
        raise BudgetTooSmall(f"with --max-step-tokens {tokens}, {error}") from error


def plan_best_steps(
    plan: Callable[[int], MemoryPlan], device_bytes: int | None = None
) -> MemoryPlan:
    """`plan` of the most tokens that are worth their memory, with the reason for no more.

    `device_bytes`: slots that the model computes from, where the plan's are the tier behind them.
    More than the least are never more than the longest sequence. The least may be: short ones share
    a step. Raises BudgetTooSmall where the least does not fit.
    """
    least = best = plan(LEAST_STEP_TOKENS)
    budget_bytes = device_bytes or best.experts_bytes
    if budget_bytes >= least.demand.experts_total_bytes:
        return replace(least, step_reason="every expert has a slot, more would move no fewer bytes")
    for tokens in LARGER_TOKENS:
        try:
            tried = plan(tokens)
        except BudgetTooSmall:
            return replace(best, step_reason=f"with {tokens}, the plan would not fit")
        if tokens > tried.longest_tokens:
            reason = f"the longest sequence has {tried.longest_tokens}"
            return replace(best, step_reason=reason)
        more_bytes = tried.demand.workspace_bytes - least.demand.workspace_bytes
        if more_bytes > WORKSPACE_SHARE * budget_bytes:
            reason = (
                f"{tokens} would take {human_bytes(more_bytes)} more,"
                f" above {100 * WORKSPACE_SHARE:.0f} % of the experts' room"
            )
            return replace(best, step_reason=reason)
        best = tried
    return replace(best, step_reason="moves missing experts least often, more would delay others")
