"""Which modules one call replaces, that it gives what they give, and what it leaves alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import tiny
from engine_kit import generate, opened, run_logits
from moestro.engine import SamplingParams
from moestro.engine.kernels import Norm, Router, Scratch, StepRoom
from moestro.engine.lanes import PackedLane
from moestro.engine.loader import Loaded
from moestro.engine.model import PackedCache, SequenceKV
from moestro.engine.model.thin import (
    ThinAttention,
    ThinMlp,
    ThinNorm,
    ThinRouter,
    are_turns,
    norm_of,
    router_of,
)
from moestro.engine.model.thin_layer import StepMemory, ThinLayer
from moestro.engine.neurons import NeuronMlp

LAYERS = tiny.WIDTHS["num_hidden_layers"]
KINDS = (ThinNorm, ThinRouter, ThinMlp, ThinAttention, ThinLayer)
Steps = list[list[tuple[int, list[int]]]]
SINGLE: Steps = [
    [(1, list(range(10, 40))), (2, list(range(60, 65))), (3, [100])],
    *[[(1, [5 + i])] for i in range(4)],
    *[[(1, [7 + i]), (2, [90 + i]), (3, [130 + i])] for i in range(6)],
]


def slow(*values: Any) -> Any:
    """A case like others that are tried each time."""
    return pytest.param(*values, marks=pytest.mark.slow)


def small(loaded: Loaded) -> dict[type, list[Any]]:
    modules = loaded.engine.runner.lane.model.modules()
    seen = [module.__dict__.get("forward") for module in modules]
    own = [each.stock if isinstance(each, NeuronMlp) else each for each in seen]
    return {kind: [each for each in own if isinstance(each, kind)] for kind in KINDS}


def counted(loaded: Loaded) -> list[int]:
    """Norms, routers, MLPs; attentions and layers that are trusted."""
    found = small(loaded)
    trusted = [sum(each.trusted for each in found[kind]) for kind in KINDS[3:]]
    return [*(len(found[kind]) for kind in KINDS[:3]), *trusted]


def packed_cache(loaded: Loaded) -> PackedCache:
    lane = loaded.engine.runner.lane
    assert isinstance(lane, PackedLane)
    return lane.cache


@contextmanager
def general(loaded: Loaded) -> Iterator[None]:
    """Inside, every module is the stock one."""
    modules = [
        (module, module.__dict__["forward"])
        for module in loaded.engine.runner.lane.model.modules()
        if isinstance(module.__dict__.get("forward"), (*KINDS, NeuronMlp))
    ]
    attended = packed_cache(loaded).attended_by_library
    layers = set(attended)
    try:
        attended.clear()
        for module, _ in modules:
            del module.__dict__["forward"]
        yield
    finally:
        attended |= layers
        for module, thin in modules:
            module.__dict__["forward"] = thin


def near(found: torch.Tensor, wanted: torch.Tensor, most: float = 1e-5) -> bool:
    return bool((found - wanted).abs().max() <= most * wanted.abs().max())


def with_windows() -> hf.PreTrainedConfig:
    config = tiny.FAMILIES["mixtral"]()
    config.sliding_window = 6
    return config


#           norms, routers, MLPs, attentions, whole layers
REPLACED = {
    "mixtral": [2 * LAYERS + 1, LAYERS, 0, LAYERS, LAYERS],
    "olmoe": [4 * LAYERS + 1, LAYERS, 0, LAYERS, LAYERS],
    "qwen3_moe": [4 * LAYERS + 1, LAYERS, 0, LAYERS, LAYERS],
    "granitemoeshared": [2 * LAYERS + 1, LAYERS, LAYERS, LAYERS, LAYERS],
    "gpt_oss": [2 * LAYERS + 1, LAYERS, 0, 0, 0],
    "deepseek_v3": [4 * LAYERS + 1, 0, 4, 0, 0],
}


FAST = ("granitemoeshared", "gpt_oss", "olmoe")


@pytest.mark.parametrize(
    "family", [family if family in FAST else slow(family) for family in REPLACED]
)
def test_single_tokens_equal_the_general_way(family: str, tmp_path: Path) -> None:
    folder = tiny.build(family, tmp_path / family)
    with opened(folder, tmp_path / "cache") as loaded:
        assert counted(loaded) == REPLACED[family]
        found = run_logits(loaded, SINGLE)
        assert torch.equal(run_logits(loaded, SINGLE), found)
        with general(loaded):
            assert counted(loaded) == [0] * 5
            wanted = run_logits(loaded, SINGLE)
    assert near(found, wanted)


@pytest.mark.parametrize("name", ["native", slow("int8")])
def test_a_prompt_in_parts_beside_others_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    folder, prompt = tiny.build("qwen3_moe", tmp_path / "model"), list(range(20, 60))
    formats = {"expert_format": name, "dense_format": name}
    with opened(folder, tmp_path / "cache", **formats) as loaded:
        assert all(each.takes_prompts for each in small(loaded)[ThinAttention])
        whole = run_logits(loaded, [[(1, prompt)]])
        for cuts in ((0, 17, 40), (0, 2, 25, 40)):
            parts = [(1, prompt[a:b]) for a, b in pairwise(cuts)]
            beside = [(2, [7, 8, 9]), (3, [11])]
            assert torch.equal(run_logits(loaded, [[part] for part in parts])[-1], whole[-1])
            found = run_logits(loaded, [[*beside, part] for part in parts])
            assert torch.equal(found[-1], whole[-1])


@pytest.mark.parametrize("name", ["int8", slow("int4")])
def test_integer_weights_are_trusted_too(name: str, tmp_path: Path) -> None:
    folder = tiny.build("qwen3_moe", tmp_path / "model")
    formats = {"expert_format": name, "dense_format": "int8"}
    with opened(folder, tmp_path / "cache", **formats) as loaded:
        assert counted(loaded) == REPLACED["qwen3_moe"]
        found = run_logits(loaded, SINGLE)
        with general(loaded):
            assert near(found, run_logits(loaded, SINGLE), 0.05)


def test_forked_answers_share_pages(tmp_path: Path) -> None:
    folder = tiny.build("qwen3_moe", tmp_path / "model")
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=3, n=3, ignore_eos=True)
    prompt = list(range(20, 57))
    with opened(folder, tmp_path / "cache") as loaded:
        found = [each.ids for each in generate(loaded.engine, [prompt, [9]], params)]
        with general(loaded):
            wanted = [each.ids for each in generate(loaded.engine, [prompt, [9]], params)]
    assert found == wanted


def test_windows_go_the_general_way(tmp_path: Path) -> None:
    folder = tiny.save(with_windows(), tmp_path / "model")
    with opened(folder, tmp_path / "cache") as loaded:
        assert counted(loaded)[3:] == [0, 0]
        assert not any(each.takes_prompts for each in small(loaded)[ThinAttention])
        found = run_logits(loaded, SINGLE)
        with general(loaded):
            assert near(found, run_logits(loaded, SINGLE))


Planted = Callable[..., Any]


def scaled(stock: Planted, by: float) -> Planted:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        out = stock(*arguments, **keywords)
        return (out[0] * by, *out[1:]) if isinstance(out, tuple) else out * by

    return forward


def chosen_otherwise(stock: Planted) -> Planted:
    """A block that makes its own shares of what its router gives."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, shares, ids = self.gate(flat)
        return self.experts(flat, ids, shares * 1.5).view(hidden.shape)

    return forward


@pytest.mark.parametrize(
    "name, member, lost",
    [
        slow("Qwen3MoeRMSNorm", None, [4 * LAYERS + 1, 0, 0, LAYERS, LAYERS]),
        slow("Qwen3MoeTopKRouter", None, [0, LAYERS, 0, 0, LAYERS]),
        ("Qwen3MoeAttention", None, [0, 0, 0, LAYERS, LAYERS]),
        slow("Qwen3MoeDecoderLayer", None, [0, 0, 0, 0, LAYERS]),
        ("Qwen3MoeSparseMoeBlock", chosen_otherwise, [0, 0, 0, 0, LAYERS]),
    ],
)
def test_who_gives_something_else_is_not_trusted(
    name: str,
    member: Callable[[Planted], Planted] | None,
    lost: Sequence[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    kind = getattr(modeling_qwen3_moe, name)
    stock = kind.forward
    monkeypatch.setattr(kind, "forward", scaled(stock, 1.01) if member is None else member(stock))
    folder = tiny.build("qwen3_moe", tmp_path / "model")
    with opened(folder, tmp_path / "cache") as loaded:
        left = [all_ - gone for all_, gone in zip(REPLACED["qwen3_moe"], lost, strict=True)]
        assert counted(loaded) == left
        assert all(a.takes_prompts == a.trusted for a in small(loaded)[ThinAttention])
        found = run_logits(loaded, SINGLE)
        with general(loaded):
            assert near(found, run_logits(loaded, SINGLE))


class OtherRouter(torch.nn.Module):
    """Wants more than rows, as some families' do."""

    top_k = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 16))

    def forward(self, hidden: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T + correction


class GatedNorm(torch.nn.Module):
    """One that may be given a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.rand(16)), 1e-6

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        mean = hidden.float().pow(2).mean(-1, keepdim=True) + self.eps
        out = (hidden * torch.rsqrt(mean)).to(hidden.dtype) * self.weight.to(hidden.dtype)
        return out if gate is None else out * gate


@torch.inference_mode()
def test_modules_that_want_more_than_rows() -> None:
    assert router_of(OtherRouter()) is None
    module = GatedNorm()
    norm = norm_of(module)
    assert norm is not None
    thin, rows, gate = ThinNorm(module.forward, norm), torch.randn(2, 16), torch.randn(2, 16)
    assert torch.equal(thin(rows, gate), module(rows, gate))
    for dtype in (torch.bfloat16, torch.float64):  # the library reads fp32
        assert torch.equal(thin(rows.to(dtype)), module(rows.to(dtype)))


def test_other_ways_to_say_positions_are_no_turns() -> None:
    pair = torch.ones(1, 2, 8), torch.zeros(1, 2, 8)
    assert are_turns(pair)
    assert not are_turns(None)
    assert not are_turns(torch.ones(1, 2, 8, dtype=torch.complex64))
    assert not are_turns(tuple(each.double() for each in pair))
    assert not are_turns((*pair, pair[0]))


def test_a_layer_of_another_dtype_goes_the_general_way(tmp_path: Path) -> None:
    folder = tiny.build("qwen3_moe", tmp_path / "model")
    with opened(folder, tmp_path / "cache") as loaded:
        layer = small(loaded)[ThinLayer][0]
        asked: list[torch.Tensor] = []

        def stock(hidden: torch.Tensor, **_: object) -> torch.Tensor:
            asked.append(hidden)
            return hidden

        layer._stock = stock
        layer._run = None  # would be called
        layer._cache.rows = object()
        turns = torch.ones(1, 1, 16), torch.zeros(1, 1, 16)
        others = {"position_embeddings": turns, "past_key_values": layer._cache}
        rows = torch.randn(1, 1, 64)
        given = [rows.bfloat16(), rows.double(), rows.to("meta")]
        assert [layer(each, **others).dtype for each in given] == [each.dtype for each in given]
        assert layer(rows, position_embeddings=None) is rows
        assert len(asked) == 4
        with pytest.raises(TypeError):
            layer(rows, **others)
        layer._cache.rows = None
        assert layer(rows, **others) is rows


def read(address: int, count: int) -> list[float]:
    import ctypes

    return list((ctypes.c_float * count).from_address(address))


def test_turns_are_those_of_the_pass() -> None:
    memory = StepMemory()

    def given(value: float) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, 2, 4], each a view whose rows do not follow each other."""
        return torch.full((1, 2, 8), value)[..., :4], torch.full((1, 2, 8), -value)[..., :4]

    for value in map(float, range(50)):  # tuples come and go: their addresses are used again
        turns = given(value)
        addresses = memory.turns(turns)
        assert memory.turns(turns) == addresses
        assert [read(each, 8) for each in addresses] == [[value] * 8, [-value] * 8]
        del turns
    memory.forget()
    turns = given(1.0)
    memory.turns(turns)
    turns[0].fill_(7)  # another pass may be given the same tuple
    memory.forget()
    assert read(memory.turns(turns)[0], 8) == [7] * 8
    assert memory.rotary == 4


def test_every_pass_forgets(tmp_path: Path) -> None:
    folder = tiny.build("qwen3_moe", tmp_path / "model")
    with opened(folder, tmp_path / "cache") as loaded:
        memory = small(loaded)[ThinLayer][0]._memory
        run_logits(loaded, [[(1, [5])]])
        assert memory._of is not None
        packed_cache(loaded).begin([(SequenceKV.alone(1), 1)])
        assert memory._of is None


def test_no_room_is_kept_of_steps_of_other_sizes() -> None:
    norm = Norm(torch.ones(16), 1e-6)
    parts: Any = type("Parts", (), {"router": Router(torch.randn(4, 16), None, 2, True)})
    memory, sizes = StepMemory(), range(1, 40)
    rooms: list[StepRoom] = [memory.room(tokens, parts) for tokens in sizes]
    assert [room.tokens for room in rooms] == list(sizes)
    assert memory.room(39, parts) is rooms[-1]
    assert len(memory._rooms) == 1 and Scratch().size_bytes == 0 and norm.eps
