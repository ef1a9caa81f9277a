"""Larger steps move fewer bytes; they are chosen where they cost next to nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from engine_kit import generate, opened
from moestro.engine import BadParameter, BudgetTooSmall, EngineConfig, SamplingParams
from moestro.engine.facts.units import MIB
from moestro.engine.planning import budgets
from moestro.engine.planning.blueprint import inspect
from moestro.engine.planning.budgets import MASK_BYTES, plan_memory
from moestro.engine.planning.memory import Demand, MemoryPlan, settle
from moestro.engine.planning.step_size import plan_best_steps, plan_given_steps

DEMAND = Demand(
    interpreter_bytes=400 * MIB,
    dense_bytes=300 * MIB,
    workspace_bytes=0,
    experts_total_bytes=10_000 * MIB,
    experts_least_bytes=50 * MIB,
    kv_bytes_per_token=MIB // 64,
    context_tokens=4096,
)
KV_BYTES = 64 * MIB  # one whole context


class Plans:
    """Plans of steps that take `token_bytes` a token, as the engine makes them."""

    def __init__(
        self,
        experts_mib: int | None,
        limit_mib: int = 20_000,
        token_bytes: int = MIB // 64,
        kv_bytes: int | None = KV_BYTES,
        demand: Demand = DEMAND,
    ) -> None:
        self.experts_bytes = None if experts_mib is None else experts_mib * MIB
        self.limit = limit_mib * MIB, "the machine"
        self.token_bytes = token_bytes
        self.kv_bytes = kv_bytes
        self.demand = demand

    def __call__(self, step_tokens: int) -> MemoryPlan:
        asked = replace(
            self.demand,
            workspace_bytes=100 * MIB + step_tokens * self.token_bytes,
            step_tokens=step_tokens,
        )
        return settle(asked, self.experts_bytes, self.kv_bytes, self.limit)


def best(plans: Plans, device_bytes: int | None = None) -> tuple[int, str]:
    plan = plan_best_steps(plans, device_bytes)
    assert plan.demand.workspace_bytes == 100 * MIB + plan.demand.step_tokens * plans.token_bytes
    assert plan.total_bytes <= plan.limit_bytes
    assert plan.demand.step_tokens == 512 or plan.demand.step_tokens <= plan.longest_tokens
    return plan.demand.step_tokens, plan.step_reason


def test_where_all_experts_have_a_slot_no_byte_would_be_saved() -> None:
    tokens, reason = best(Plans(10_000, token_bytes=1))
    assert tokens == 512 and "every expert has a slot" in reason


def test_the_most_where_memory_is_plenty() -> None:
    tokens, reason = best(Plans(5000))
    assert tokens == 2048 and "would delay others" in reason


# From 512 on, 1024 tokens take 8 MiB more and 2048 take 24: 5 % of 160 and of 480 MiB.
@pytest.mark.parametrize(
    ("experts_mib", "tokens", "words"),
    [
        (159, 512, "1024 would take 8 MiB more, above 5 % of the experts' room"),
        (160, 1024, "2048 would take 24 MiB more"),
        (479, 1024, "2048 would take 24 MiB more"),
        (480, 2048, "least often"),
    ],
)
def test_a_twentieth_of_the_experts_room_at_the_most(
    experts_mib: int, tokens: int, words: str
) -> None:
    found, reason = best(Plans(experts_mib))
    assert found == tokens and words in reason


def test_a_device_s_slots_count_and_not_the_tier_behind_them() -> None:
    plans = Plans(10_000)  # the host holds all
    assert best(plans, 160 * MIB)[0] == 1024
    assert best(plans, 10_000 * MIB) == best(Plans(10_000))


def test_the_plan_stays_valid() -> None:
    """Budgets that were given are never changed for larger steps."""
    taken = 400 + 300 + 100 + 8 + 5000 + 64
    assert best(Plans(5000, limit_mib=taken)) == (512, "with 1024, the plan would not fit")
    assert best(Plans(5000, limit_mib=taken + 8))[0] == 1024
    with pytest.raises(BudgetTooSmall):
        best(Plans(5000, limit_mib=taken - 1))


def test_chosen_budgets_give_little() -> None:
    plans = Plans(None, limit_mib=4000)
    chosen, least = plan_best_steps(plans), plans(512)
    assert chosen.demand.step_tokens == 2048
    assert 0.95 * least.experts_bytes <= chosen.experts_bytes < least.experts_bytes
    assert chosen.total_bytes == least.total_bytes


@pytest.mark.parametrize(("context", "tokens"), [(100, 512), (1024, 1024), (2047, 1024)])
def test_never_more_than_the_longest_sequence(context: int, tokens: int) -> None:
    """512 stay where sequences are shorter: some of them share a step."""
    found, reason = best(Plans(5000, demand=replace(DEMAND, context_tokens=context)))
    assert found == tokens and reason == f"the longest sequence has {context}"
    by_kv, reason = best(Plans(5000, kv_bytes=20 * MIB))
    assert (by_kv, reason) == (1024, "the longest sequence has 1280")


def test_given_ones_are_taken_or_named_in_the_refusal() -> None:
    plan = plan_given_steps(Plans(10_000), 8192)
    assert (plan.demand.step_tokens, plan.demand.workspace_bytes) == (8192, 228 * MIB)
    assert f"{8192:>10}  tokens (--max-step-tokens): as given" in "\n".join(plan.lines())
    tight = Plans(None, limit_mib=1000)
    assert plan_given_steps(tight, 512).demand.step_tokens == 512
    with pytest.raises(
        BudgetTooSmall, match=r"^with --max-step-tokens 16384, the plan needs 1.2 GiB"
    ):
        plan_given_steps(tight, 16384)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("steps") / "model")


def test_the_workspace_grows_with_the_step(folder: Path, tmp_path: Path) -> None:
    def workspace(tokens: int, context: int) -> int:
        config = EngineConfig(
            folder, tmp_path, max_step_tokens=tokens, max_model_len_tokens=context
        )
        return plan_memory(config, inspect(config)).parts()["workspace"]

    per_token = 4 * (2 * 64 + 6 * 64 + 3 * 256)
    for context in (128, 512):
        grown = workspace(1024, context) - workspace(64, context)
        assert grown == 960 * (per_token + MASK_BYTES * context)


def test_what_others_hold_changes_budgets_and_never_the_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(folder, tmp_path)
    understood, plans = inspect(config), []
    for available_bytes in (1 << 50, 0):
        monkeypatch.setattr(budgets, "memory_available", lambda free=available_bytes: free)
        plans.append(plan_memory(config, understood))
    plenty, none = plans
    assert plenty.experts_bytes == plenty.demand.experts_total_bytes
    assert none.experts_bytes == none.demand.experts_least_bytes
    assert none.demand.step_tokens == plenty.demand.step_tokens
    assert none.step_reason.startswith(f"{plenty.step_reason} (were all of the limit free")


def test_a_cache_in_memory_is_counted_with_the_pack_that_is_to_come(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(folder, tmp_path)
    understood = inspect(config)
    (tmp_path / "held").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(budgets, "is_in_memory", lambda place: place == tmp_path)
    held = plan_memory(config, understood).demand.files_bytes
    assert 3 << 20 <= held < 4 << 20
    packing = plan_memory(config, understood, packing=True).demand.files_bytes
    assert packing == held + understood.spec.total_bytes
    monkeypatch.setattr(budgets, "is_in_memory", lambda _: False)
    assert plan_memory(config, understood, packing=True).demand.files_bytes == 0


def test_a_step_has_a_token_for_each_who_runs(tmp_path: Path) -> None:
    EngineConfig(tmp_path, tmp_path, max_step_tokens=16)
    for tokens in (-1, 0, 15):
        with pytest.raises(BadParameter, match="max_step_tokens"):
            EngineConfig(tmp_path, tmp_path, max_step_tokens=tokens)


def test_the_scheduler_takes_what_the_plan_chose(folder: Path, tmp_path: Path) -> None:
    prompt = [number % 250 for number in range(300)]
    loads, answers = {}, []
    for tokens in (None, 100):
        settings = {"max_step_tokens": tokens, "host_memory_bytes": 200 << 10, "prefetch": False}
        with opened(folder, tmp_path, **settings) as loaded:
            plan, limits = loaded.plan, loaded.engine.scheduler.limits
            assert limits.max_step_tokens == plan.demand.step_tokens == (tokens or 512)
            before = loaded.cache.stats().loads
            params = SamplingParams(max_tokens=1, temperature=0.0)
            answers.append(generate(loaded.engine, [prompt], params)[0].ids)
            loads[tokens] = loaded.cache.stats().loads - before
            assert loaded.stats().prefill_steps == (1 if tokens is None else 3)
    assert answers[0] == answers[1]
    assert loads[100] > 2 * loads[None]
