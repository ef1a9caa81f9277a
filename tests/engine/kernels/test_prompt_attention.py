"""A prompt's attention by the library against plain torch in double precision."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.engine.kernels import (
    attend_prompt,
    attends_prompts,
    instruction_sets,
    set_pool_threads,
)
from moestro.engine.kernels.library import choose

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SHAPES = [  # heads, key heads, new tokens, all tokens, width of keys, of values
    (2, 2, 1, 1, 16, 16),
    (4, 2, 5, 133, 80, 48),
    (9, 3, 37, 300, 64, 64),
    (8, 1, 129, 260, 256, 256),
    (3, 3, 300, 300, 32, 96),
]


def prompt(shape: tuple[int, ...], seed: int = 0) -> Three:
    heads, key_heads, tokens, length, dim, value_dim = shape
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn((tokens, heads, dim), generator=draw).transpose(0, 1)
    keys = torch.randn((key_heads, length + 3, dim), generator=draw)[:, :length]
    return queries, keys, torch.randn((key_heads, length, value_dim), generator=draw)


def expected(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[T, heads, Dv], as `attend_prompt` with a factor of 0.2."""
    tokens, length, group = queries.shape[1], keys.shape[1], len(queries) // len(keys)
    keys, values = (each.double().repeat_interleave(group, 0) for each in (keys, values))
    scores = 0.2 * queries.double() @ keys.transpose(1, 2)
    seen = torch.ones((tokens, length), dtype=torch.bool).tril(length - tokens)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_torch_gives(instruction_set: str, shape: tuple[int, ...]) -> None:
    three = prompt(shape)
    assert attends_prompts(*three)
    found = attend_prompt(*three, 0.2)
    assert (found - expected(*three)).abs().max() < 1e-5


@pytest.mark.parametrize("cuts", [(0, 1, 2, 300), (0, 128, 300), (0, 7, 255, 257, 300)])
def test_a_prompt_in_parts_is_the_same_to_the_bit(
    instruction_set: str, cuts: tuple[int, ...]
) -> None:
    queries, keys, values = prompt((6, 2, 300, 300, 48, 32))
    whole = attend_prompt(queries, keys, values, 0.2)
    parts = [
        attend_prompt(queries[:, start:end], keys[:, :end], values[:, :end], 0.2)
        for start, end in pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(instruction_sets()))
    key_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    tokens, past = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 270))
    dim, value_dim = (16 * data.draw(st.integers(1, 9)) for _ in range(2))
    shape = (key_heads * group, key_heads, tokens, past + tokens, dim, value_dim)
    choose(name)
    try:
        three = prompt(shape, seed=past)
        assert (attend_prompt(*three, 0.2) - expected(*three)).abs().max() < 1e-5
    finally:
        choose(instruction_sets()[0])


def test_threads_change_no_bit() -> None:
    three = prompt((4, 2, 600, 700, 32, 32))
    alone = attend_prompt(*three, 0.2)
    try:
        set_pool_threads(3)
        assert torch.equal(attend_prompt(*three, 0.2), alone)
    finally:
        set_pool_threads(1)


def test_scores_far_apart_keep_their_weights(instruction_set: str) -> None:
    queries, keys, values = prompt((1, 1, 4, 400, 16, 16))
    keys[0, 3] = 1e4 * queries[0, 2] / queries[0, 2].norm()
    three = queries, keys, values
    assert (attend_prompt(*three, 0.2) - expected(*three)).abs().max() < 1e-5


def test_what_is_no_number_stays_with_its_token(instruction_set: str) -> None:
    three = prompt((2, 1, 40, 40, 32, 32))
    three[0][0, 17, 5] = float("nan")
    found, wanted = attend_prompt(*three, 0.2), expected(*three)
    assert found[17, 0].isnan().all()
    assert torch.equal(found.isnan().any(-1), wanted.isnan().any(-1))


@pytest.mark.parametrize(
    "changed",
    [
        lambda each: each.double(),
        lambda each: each[..., ::2],
        lambda each: each[..., :24],
        lambda each: each.repeat(1, 1, 9),
        lambda each: each.to("meta"),
    ],
    ids=["double", "strided", "width 24", "width 288", "elsewhere"],
)
@pytest.mark.parametrize("which", range(3))
def test_others_are_left_to_torch(which: int, changed: object) -> None:
    three = list(prompt((1, 1, 2, 2, 32, 32)))
    three[which] = changed(three[which])  # type: ignore[operator]
    assert not attends_prompts(*three)
