"""Penalties as transformers and OpenAI have them; bias and bans as said."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from moestro.engine import SamplingParams
from moestro.engine.step.adjust import Adjustments
from moestro.engine.step.truncation import Floats

LOGITS: Floats = np.array([2.0, -1.0, 0.5, 0.0, 3.0, -2.0], np.float32)


def test_nothing_to_change_is_no_copy() -> None:
    assert Adjustments(SamplingParams(), [1, 2], {0}).apply(LOGITS) is LOGITS


def test_repetition_counts_prompt_and_answer() -> None:
    changes = Adjustments(SamplingParams(repetition_penalty=1.7), [1, 1, 4])
    changes.saw(2)
    ids = torch.tensor([[1, 1, 4, 2]])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.tensor(LOGITS)[None].clone())[0]
    assert changes.apply(LOGITS) == pytest.approx(wanted.numpy())
    assert LOGITS[1] == -1.0, "the model's own are left alone"


def test_presence_once_and_frequency_each_time_of_the_answer_alone() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    changes = Adjustments(params, [0, 0, 0])
    for token in (4, 4, 1):
        changes.saw(token)
    wanted = LOGITS.copy()
    wanted[4] -= 0.5 + 2 * 0.25
    wanted[1] -= 0.5 + 0.25
    assert changes.apply(LOGITS) == pytest.approx(wanted)


def test_many_tokens_are_remembered() -> None:
    changes = Adjustments(SamplingParams(frequency_penalty=1.0), ())
    logits = np.zeros(500, np.float32)
    for token in [*range(300), *range(300), 7]:
        changes.saw(token)
    found = changes.apply(logits)
    assert found[:300].tolist() == [-3.0 if token == 7 else -2.0 for token in range(300)]
    assert not found[300:].any()


def test_bias_bans_and_forces() -> None:
    changes = Adjustments(SamplingParams(logit_bias=((4, -100.0), (5, 100.0))), ())
    found = changes.apply(LOGITS)
    assert (int(found.argmax()), int(found.argmin())) == (5, 4)


def test_the_end_cannot_come_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(0,))
    changes = Adjustments(params, (), {4, 99})  # 99: a model may have fewer logits than tokens
    for _ in range(2):
        found = changes.apply(LOGITS)
        assert np.isneginf(found[[0, 4]]).all() and found.argmax() == 2
        changes.saw(2)
    assert changes.apply(LOGITS) is LOGITS


def test_a_constraint_forbids_and_follows() -> None:
    class Only:
        """Allows one token at a time: 5, 3, 1."""

        left = [1, 3, 5]

        @property
        def finished(self) -> bool:
            return not self.left

        def forbid(self, logits: Floats) -> None:
            logits[np.arange(len(logits)) != self.left[-1]] = -np.inf

        def advance(self, token_id: int) -> None:
            assert token_id == self.left.pop()

    changes = Adjustments(SamplingParams(logit_bias=((0, 100.0),)), (), constraint=Only())
    chosen: list[int] = []
    for _ in range(3):
        chosen.append(int(changes.apply(LOGITS).argmax()))
        changes.saw(chosen[-1])
    assert chosen == [5, 3, 1] and changes.finished
