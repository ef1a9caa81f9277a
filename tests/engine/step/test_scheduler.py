"""Who runs next: lengths and bytes only."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.engine import PromptTooLong, QueueFull, SamplingParams
from moestro.engine.step.scheduler import Scheduler, SchedulerLimits
from moestro.engine.step.sequence import Batch, Sequence


def limits(**changes: Any) -> SchedulerLimits:
    values: dict[str, Any] = {
        "max_running": 4,
        "max_waiting": 8,
        "max_step_tokens": 16,
        "kv_capacity_bytes": 64 * 8,
        "kv_bytes_per_token": 1,
    }
    return SchedulerLimits(**values | changes)


def sequence(number: int, prompt_tokens: int, max_tokens: int = 4) -> Sequence:
    return Sequence(number, [0] * prompt_tokens, SamplingParams(max_tokens=max_tokens))


def advance(batch: Batch) -> None:
    """Do what a step does to the lengths."""
    for part in batch.parts:
        part.sequence.computed_tokens += part.tokens
        if part.sequence.pending_tokens == 0:
            part.sequence.token_ids.append(0)


def test_a_long_prompt_is_cut_into_chunks() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(sequence(1, 40))
    sizes = []
    for _ in range(4):
        batch = scheduler.next_batch()
        sizes.append(batch.parts[0].tokens)
        advance(batch)
    assert sizes == [16, 16, 8, 1]


def test_decoding_goes_on_beside_a_prompt() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(sequence(1, 3))
    advance(scheduler.next_batch())
    scheduler.add(sequence(2, 40))
    batch = scheduler.next_batch()
    assert [(part.sequence.number, part.tokens) for part in batch.parts] == [(1, 1), (2, 15)]
    assert batch.is_prefill
    assert batch.parts[0].ends_pending and not batch.parts[1].ends_pending


def test_admission_is_all_or_nothing_and_first_come_first_served() -> None:
    scheduler = Scheduler(limits(kv_capacity_bytes=128))
    scheduler.add(sequence(1, 60))  # 63 tokens in the KV: 64 reserved
    scheduler.add(sequence(2, 100))  # 128 reserved: has to wait
    scheduler.add(sequence(3, 4))  # would fit, but is behind
    assert [part.sequence.number for part in scheduler.next_batch().parts] == [1]
    assert len(scheduler.waiting) == 2
    scheduler.remove(scheduler.running[0])
    assert [part.sequence.number for part in scheduler.next_batch().parts] == [2]
    scheduler.check()


def test_a_full_queue_refuses_and_changes_nothing() -> None:
    scheduler = Scheduler(limits(max_waiting=2))
    scheduler.add(sequence(1, 3))
    scheduler.add(sequence(2, 3))
    with pytest.raises(QueueFull, match="2 requests wait"):
        scheduler.add(sequence(3, 3))
    assert len(scheduler.waiting) == 2


@given(
    arrivals=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 20), st.booleans()), min_size=1, max_size=12
    )
)
def test_everybody_is_served_and_nothing_is_overbooked(
    arrivals: list[tuple[int, int, bool]],
) -> None:
    scheduler = Scheduler(limits(max_waiting=99, kv_capacity_bytes=192))
    pending = [
        (sequence(number, prompt, most), step)
        for number, (prompt, most, step) in enumerate(arrivals)
    ]
    served: dict[int, int] = {}
    for _ in range(2000):
        if pending:
            arrived, step_first = pending.pop(0)
            scheduler.add(arrived)
            if not step_first:
                continue
        batch = scheduler.next_batch()
        scheduler.check()
        assert sum(part.tokens for part in batch.parts) <= 16
        assert all(0 < part.tokens <= part.sequence.pending_tokens for part in batch.parts)
        advance(batch)
        for part in batch.parts:
            running = part.sequence
            assert running.computed_tokens <= running.capacity_tokens
            if running.generated_tokens == running.params.max_tokens:
                served[running.number] = running.generated_tokens
                scheduler.remove(running)
        if not pending and not scheduler.running and not scheduler.waiting:
            break
    assert len(served) == len(arrivals)
    assert scheduler.kv_reserved_bytes == 0


def keeping(number: int, n: int = 1, density: float | None = 0.5) -> Sequence:
    """40 tokens of prompt and 10 new ones: 4 pages of 16 bytes, of which 2 are shared."""
    params = SamplingParams(max_tokens=10, n=n, expert_density=density)
    return Sequence(number, [0] * 40, params)


def copies_bytes(prompt_tokens: int, density: float | None) -> int:
    return 0 if density is None else int(100 * density)


def test_copies_of_neurons_take_room_that_answers_share_and_leave_it() -> None:
    scheduler = Scheduler(limits(kv_capacity_bytes=16 * 16), copies_bytes)
    scheduler.add(keeping(1, n=3))
    scheduler.add(keeping(2))
    scheduler.add(keeping(3, density=None))
    advance(scheduler.next_batch())
    (first,) = scheduler.running  # 4 + 2 + 2 pages, and 4 for 50 bytes of copies
    assert scheduler.kv_reserved_bytes == 16 * 12 and len(first.pages_of_copies) == 4
    for _ in range(2):
        advance(scheduler.next_batch())
    twins = scheduler.fork(first)
    scheduler.check()
    assert scheduler.kv_reserved_bytes == 16 * 12
    assert all(twin.pages_of_copies == first.pages_of_copies for twin in twins)
    scheduler.remove(first)
    scheduler.remove(twins[0])
    scheduler.check()
    assert scheduler.kv_reserved_bytes == 16 * 8
    scheduler.remove(twins[1])
    assert scheduler.kv_reserved_bytes == 0
    scheduler.next_batch()
    assert [each.number for each in scheduler.running] == [2, 3]
    assert scheduler.kv_reserved_bytes == 16 * 12
    scheduler.check()


def test_copies_that_never_fit_are_refused_in_words() -> None:
    scheduler = Scheduler(limits(kv_capacity_bytes=16 * 6), copies_bytes)
    scheduler.refuse_what_never_fits(keeping(1, density=None))
    scheduler.refuse_what_never_fits(keeping(1, density=0.25))
    with pytest.raises(PromptTooLong, match=r"128 bytes of KV, there are 96, 64 of them.*density"):
        scheduler.refuse_what_never_fits(keeping(1))
    assert scheduler.most_new_tokens(40, 1) == scheduler.most_new_tokens(40, 1, 0.25) + 32
    assert scheduler.most_new_tokens(40, 1, 0.5) == 0
