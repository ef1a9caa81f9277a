"""Parameters are checked where they are made."""

import pytest

from moestro.engine import BadParameter, SamplingParams
from moestro.engine.step.sequence import Sequence


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("min_tokens", 17),
        ("min_p", 1.1),
        ("n", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", ((1, 101.0),)),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("stop", ("a", "")),
        ("seed", 2**64),
    ],
)
def test_bad_values_name_their_field(field: str, value: object) -> None:
    with pytest.raises(BadParameter) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
    assert field in str(caught.value)


def test_three_lengths() -> None:
    sequence = Sequence(1, [1, 2, 3], SamplingParams(max_tokens=62))
    assert (sequence.pending_tokens, sequence.generated_tokens) == (3, 0)
    sequence.computed_tokens = 3
    sequence.token_ids.append(9)
    assert (sequence.pending_tokens, sequence.generated_tokens) == (1, 1)
    assert sequence.capacity_tokens == 64  # 3 + 62 - 1
    assert Sequence(1, [1, 2, 3], SamplingParams(max_tokens=0)).capacity_tokens == 3
