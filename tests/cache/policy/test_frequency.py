"""Decayed rates, and the order that they give."""

import pytest

from moestro.cache import DecayedFrequency, ExpertKey, NextUse, Routed

A, B, C = (ExpertKey(0, expert) for expert in range(3))


def keep(policy: DecayedFrequency, *keys: ExpertKey) -> None:
    for key in keys:
        policy.added(key)


def test_the_rarest_leaves_first() -> None:
    policy = DecayedFrequency()
    keep(policy, A, B, C)
    for event in ([A, C], [A, C], [A, B]):
        policy.asked(event)
    assert policy.victims(3, ()) == [B, C, A]


def test_old_events_lose_half_their_weight_in_a_half_life() -> None:
    policy = DecayedFrequency(half_life_events=2)
    keep(policy, A, B)
    for _ in range(2):
        policy.asked([A])
    for _ in range(2):
        policy.asked([B])
    assert policy.victims(1, ()) == [A]
    rates = [policy._layers[0].counts[key.expert] for key in (A, B)]
    assert rates[1] / rates[0] == pytest.approx(2, rel=0.2)  # but for what nobody knew at first


def test_events_of_other_layers_age_nobody() -> None:
    policy = DecayedFrequency(half_life_events=1)
    other = ExpertKey(1, 0)
    keep(policy, A, other)
    policy.asked([A])
    for event in ([other], [ExpertKey(1, 1)], [ExpertKey(1, 1)]):
        policy.asked(event)
    assert policy.victims(1, ()) == [other]


def test_who_comes_back_is_remembered() -> None:
    policy = DecayedFrequency()
    keep(policy, A, B)
    for _ in range(5):
        policy.asked([A])
    policy.removed(A)
    policy.asked([B])
    policy.added(A)
    assert policy.victims(2, ()) == [B, A]


def test_weights_never_overflow() -> None:
    policy = DecayedFrequency(half_life_events=0.5)
    keep(policy, A, B, C)
    for _ in range(2000):
        policy.asked([A, B])
        policy.asked([A])
    assert policy.victims(3, ()) == [C, B, A]
    assert policy._layers[0].rate(A) == pytest.approx(1)


def test_the_last_event_may_count_extra() -> None:
    for share, first in ((0.0, B), (0.9, A)):
        policy = DecayedFrequency(last_event_share=share)
        keep(policy, A, B)
        for event in ([A], [A], [A], [B]):
            policy.asked(event)
        assert policy.victims(1, ()) == [first]


def test_a_prompts_favourites_are_expected_of_its_answer() -> None:
    policy = DecayedFrequency()
    keep(policy, A, B, C)
    policy.asked([A, B, C], Routed(10, (2, 9, 5)))
    assert policy.victims(3, ()) == [A, C, B]


def test_a_prompt_counts_like_as_many_steps_as_it_has_tokens() -> None:
    prompt, steps = DecayedFrequency(), DecayedFrequency()
    prompt.asked([A], Routed(3, (3,)))
    for _ in range(3):
        steps.asked([A])
    for policy in (prompt, steps):
        policy.asked([B])
    rates = [policy._layers[0].rate(A) for policy in (prompt, steps)]
    assert rates[0] == pytest.approx(rates[1])


def test_however_long_a_prompt_the_past_keeps_half_its_weight() -> None:
    policy = DecayedFrequency(half_life_events=4)
    for _ in range(100):
        policy.asked([A])
    policy.asked([B], Routed(10_000, (10_000,)))
    rates = [policy._layers[0].rate(key) for key in (A, B)]
    assert rates == pytest.approx([0.5, 0.5], rel=0.01)


def test_scores_compare_kept_keys_with_others() -> None:
    policy = NextUse()
    keep(policy, A)
    for event in ([A, B], [B]):
        policy.asked(event)
    assert policy.keep_score(B) > policy.keep_score(A)


def test_victims_have_the_lowest_scores() -> None:
    policy = NextUse()
    keys = [ExpertKey(layer, expert) for layer in range(3) for expert in range(3)]
    keep(policy, *keys)
    for step in range(4):
        for layer in range(3):
            policy.asked([ExpertKey(layer, step % 3), ExpertKey(layer, (step + layer) % 2)])
    victims = policy.victims(9, ())
    assert victims is not None
    scores = [policy.keep_score(key) for key in victims]
    assert scores == sorted(scores)
    assert len(set(scores)) > 3


@pytest.mark.parametrize(("half_life", "share"), [(0, 0.0), (-1, 0.0), (4, -0.1), (4, 1.1)])
def test_impossible_settings_are_refused(half_life: float, share: float) -> None:
    with pytest.raises(ValueError, match="half-life"):
        DecayedFrequency(half_life, share)


class TestNextUse:
    def circle(self) -> NextUse:
        """Three layers of two experts, all asked for alike; layer 1 was the last to run."""
        policy = NextUse()
        keep(policy, *(ExpertKey(layer, expert) for layer in range(3) for expert in range(2)))
        for layer in (0, 1, 2, 0, 1):
            policy.asked([ExpertKey(layer, 0), ExpertKey(layer, 1)])
        return policy

    def test_of_equals_the_layer_that_runs_again_last(self) -> None:
        victims = self.circle().victims(6, ())
        assert victims is not None
        assert [key.layer for key in victims] == [1, 1, 0, 0, 2, 2]

    def test_a_rare_one_leaves_before_a_far_one(self) -> None:
        policy = self.circle()
        for _ in range(3):
            for layer in (2, 0, 1):
                policy.asked([ExpertKey(layer, 0)])
        victims = policy.victims(4, ())
        assert victims is not None
        assert [key.expert for key in victims] == [1, 1, 1, 0]

    def test_a_circle_longer_than_the_cache_keeps_its_hits(self) -> None:
        """Where least recently used has none: 4 slots, 3 layers that ask for 2 each."""
        policy, kept, hits = NextUse(), set[ExpertKey](), 0
        for step in range(10):
            for layer in range(3):
                event = [ExpertKey(layer, 0), ExpertKey(layer, 1)]
                policy.asked(event)
                wanted = [key for key in event if key not in kept]
                hits += len(event) - len(wanted) if step > 0 else 0
                for key in policy.victims(len(kept) + len(wanted) - 4, set(event)) or []:
                    policy.removed(key)
                    kept.remove(key)
                keep(policy, *wanted)
                kept.update(wanted)
        assert hits >= 9 * 2
