"""A prompt's statistics choose neurons of shared experts and dense layers for its answer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import tiny
from engine_kit import generate_each, opened
from moestro.engine import PromptTooLong, SamplingParams
from moestro.engine.loader import Loaded
from moestro.engine.model import ThinLayer, ThinMlp
from moestro.engine.step.sequence import Batch, Part
from moestro.engine.step.sequence import Sequence as Running

PROMPT = list(range(10, 40))
OTHER = list(range(60, 85))
TOKENS = [7, 8, 9, 10]
DENSITY = 0.75  # both experts of each layer, but not all blocks of neurons
EXPERTS = 2

# Blocks: 6 of a dense layer, 5 of a shared expert; an odd number is kept of each.
WIDTHS: dict[str, Any] = {**tiny.WIDTHS, "intermediate_size": 96, "num_hidden_layers": 3}


def deepseek() -> hf.PreTrainedConfig:
    return hf.DeepseekV3Config(
        **{**WIDTHS, "num_key_value_heads": 4},
        moe_intermediate_size=80,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=EXPERTS,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )


def qwen2() -> hf.PreTrainedConfig:
    return hf.Qwen2MoeConfig(
        **WIDTHS,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=80,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS,
        mlp_only_layers=[1],
    )


def granite() -> hf.PreTrainedConfig:
    return hf.GraniteMoeSharedConfig(
        **WIDTHS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=EXPERTS,
        shared_intermediate_size=80,
        tie_word_embeddings=True,
    )


FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedConfig], str]] = {
    "deepseek": (deepseek, "down_proj"),
    "qwen2": (qwen2, "down_proj"),
    "granite": (granite, "output_linear"),
}


@pytest.fixture(
    scope="module", params=["granite", "deepseek", pytest.param("qwen2", marks=pytest.mark.slow)]
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(FAMILIES[family][0](), tmp_path_factory.mktemp(family) / "model")


def asking(density: float | None, **more: Any) -> SamplingParams:
    plain: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    return SamplingParams(**plain | more, expert_density=density)


class Decoding:
    """Sequences of an engine, stepped by hand."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.known = loaded, dict[int, Running]()

    def begin(self, number: int, ids: list[int], density: float | None) -> None:
        sequence = Running(number, ids, SamplingParams(max_tokens=64, expert_density=density))
        sequence.pages = self.loaded.engine.scheduler.pool.take(8)
        self.known[number] = sequence

    def step(self, **tokens: int) -> torch.Tensor:
        """`_1=5`: so many tokens of what sequence 1 has pending. Logits of those that have none."""
        parts = tuple(Part(self.known[int(name[1:])], count) for name, count in tokens.items())
        return self.loaded.engine.runner.run(Batch(parts)).logits

    def decode(self, token: int, *numbers: int) -> torch.Tensor:
        """One token more of each."""
        for number in numbers:
            self.known[number].token_ids.append(token)
        return self.step(**{f"_{number}": 1 for number in numbers})

    def alone(self, number: int, ids: list[int], density: float | None) -> torch.Tensor:
        """[1 + len(TOKENS), V]: after the prompt, and after each of TOKENS."""
        self.begin(number, ids, density)
        rows = [self.step(**{f"_{number}": len(ids)})]
        return torch.cat(rows + [self.decode(token, number) for token in TOKENS])

    def blocks(self, number: int) -> Any:
        selection = self.loaded.engine.runner.selection
        assert selection is not None
        return selection.kept_blocks((number, 0))

    def end(self) -> None:
        for sequence in self.known.values():
            self.loaded.engine.runner.forget(sequence)
            self.loaded.engine.scheduler.pool.release(sequence.pages)


class Stock:
    """Stock transformers, with GRIFFIN done by hand."""

    def __init__(self, folder: Path, down: str) -> None:
        self.model = tiny.oracle(folder)
        self.downs = [
            each for name, each in self.model.named_modules() if name.rpartition(".")[2] == down
        ]

    def logits(self, ids: list[int], blocks: Any = None) -> torch.Tensor:
        """As `Decoding.alone`. `blocks` to keep; None: those that the statistics choose."""
        scores: list[torch.Tensor] = []

        def look(_: Any, given: Any) -> None:
            (inner,) = given
            inner = inner.reshape(-1, inner.shape[-1]).double()
            neurons = inner.div(inner.norm(dim=1, keepdim=True)).square().sum(0)
            scores.append(neurons.view(-1, 16).sum(1))

        handles = [each.register_forward_pre_hook(look) for each in self.downs]
        with torch.inference_mode():
            out = self.model(torch.tensor([ids]), use_cache=True)
            for handle in handles:
                handle.remove()
            self.chosen = tuple(
                tuple(sorted(each.topk(int(DENSITY * len(each) + 0.5)).indices.tolist()))
                for each in scores
            )
            for linear, kept in zip(self.downs, blocks or self.chosen, strict=True):
                lost = [b for b in range(linear.in_features // 16) if b not in kept]
                linear.weight.view(linear.out_features, -1, 16)[:, lost] = 0
            rows = [out.logits[0, -1:]]
            for token in TOKENS:
                given: Any = {"past_key_values": out.past_key_values, "use_cache": True}
                out = self.model(torch.tensor([[token]]), **given)
                rows.append(out.logits[0, -1:])
        return torch.cat(rows)


@pytest.mark.parametrize(
    ("dense_format", "products"),
    [
        ("native", "library"),
        ("int8", "library"),
        pytest.param("native", "torch", marks=pytest.mark.slow),
        pytest.param("int8", "torch", marks=pytest.mark.slow),
    ],
)
def test_an_answer_is_stocks_without_the_other_neurons(
    family: str,
    folder: Path,
    dense_format: str,
    products: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if products == "torch":
        monkeypatch.setattr("moestro.engine.formats.named.library", lambda: None)
    with opened(folder, tmp_path / "cache", dense_format=dense_format) as loaded:
        steps = Decoding(loaded)
        found, blocks = steps.alone(1, PROMPT, DENSITY), steps.blocks(1)
        whole = steps.alone(2, PROMPT, None)
        assert torch.equal(found[0], whole[0]) and steps.blocks(2) is None
    stock = Stock(folder, FAMILIES[family][1])
    wanted = stock.logits(PROMPT, None if dense_format == "native" else blocks)
    assert [len(kept) for kept in blocks] == [len(kept) for kept in stock.chosen]
    apart = (found - wanted).abs().max()
    if dense_format == "native":
        assert blocks == stock.chosen
        assert apart < 1e-4
    else:
        assert apart < 0.1 * wanted.abs().max()
    assert (whole[1:] - wanted[1:]).abs().max() > 2 * apart


@pytest.fixture(scope="module", params=["native", pytest.param("int8", marks=pytest.mark.slow)])
def loaded(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loaded]:
    """For tests that leave nothing running in it."""
    cache = tmp_path_factory.mktemp("cache")
    with opened(folder, cache, dense_format=request.param) as found:
        yield found


def test_a_prompt_in_chunks_keeps_the_neurons_that_it_keeps_whole(loaded: Loaded) -> None:
    steps = Decoding(loaded)
    for number in (1, 2, 3):
        steps.begin(number, PROMPT, 0.5)
    steps.begin(4, OTHER, 0.5)
    steps.step(_1=30)
    for tokens in (10, 19, 1):
        steps.step(_2=tokens)
    steps.step(_4=20, _3=17)
    steps.step(_3=13, _4=5)
    kept = [steps.blocks(number) for number in (1, 2, 3, 4)]
    steps.end()
    assert kept[0] == kept[1] == kept[2] != kept[3]


def in_company(loaded: Loaded, densities: dict[int, float | None]) -> dict[int, torch.Tensor]:
    """Rows of sequences of the same prompt, decoded together, beside another one's prompt."""
    steps = Decoding(loaded)
    for number, density in densities.items():
        steps.begin(number, PROMPT, density)
    steps.begin(5, [*OTHER, *OTHER], 0.5)
    rows = [steps.step(_1=30, _5=5, _2=30, _3=30, _4=30)]
    for token in TOKENS[:2]:
        rows.append(steps.decode(token, 4, 3, 2, 1)[[3, 2, 1, 0]])
    for at, token in enumerate(TOKENS[2:], 1):
        for number in densities:
            steps.known[number].token_ids.append(token)
        rows.append(steps.step(_1=1, _2=1, _5=5 * at, _3=1, _4=1))
    steps.end()
    return dict(zip(densities, torch.stack(rows, dim=1), strict=True))


def test_whatever_the_company_keeps_changes_no_bit(loaded: Loaded, family: str) -> None:
    """Stock's own operators, which some families keep, see how many rows there are: so these are

    as many each time. Where all is the library's, a sequence alone is one of them.
    """
    found = in_company(loaded, {1: 0.5, 2: None, 3: 0.25, 4: 1.0})
    plain = in_company(loaded, {1: None, 2: None, 3: None, 4: None})
    other = in_company(loaded, {1: 0.5, 2: 0.25, 3: 0.25, 4: 0.5})
    assert torch.equal(found[2], plain[2])
    assert torch.equal(found[4], plain[4])  # density 1 is the model's own
    assert torch.equal(found[1], other[1]) and torch.equal(found[3], other[3])
    assert torch.equal(found[1][0], plain[1][0])  # the prompt's own
    assert not torch.equal(found[1][1:], plain[1][1:]) and not torch.equal(found[1], found[3])
    if family == "granite":
        steps = Decoding(loaded)
        for number, density in ((1, 0.5), (2, None), (3, 0.25)):
            assert torch.equal(steps.alone(number, PROMPT, density), found[number])
        steps.end()


def test_whole_layers_of_the_library_do_not_go_around_it(loaded: Loaded, family: str) -> None:
    """Granite's layers are computed in two calls, its shared expert in the second of them."""
    layers = [
        thin
        for module in loaded.engine.runner.lane.model.modules()
        if isinstance(thin := module.__dict__.get("forward"), ThinLayer) and thin.trusted
    ]
    assert len(layers) == (3 if family == "granite" else 0)
    assert all(layer.shared_apart is not None for layer in layers)


def held_tensors(loaded: Loaded) -> int:
    """Bytes of all copies, as they lie."""
    selection = loaded.engine.runner.selection
    assert selection is not None
    kept = {id(each): each for each in selection._kept.values()}
    found = [copy for each in kept.values() for copy in each.neurons.copies if copy is not None]
    assert all(isinstance(copy, ThinMlp) for copy in found)
    matrices = [(copy.expert.first, copy.expert.down) for copy in found]  # type: ignore[attr-defined]
    return sum(matrix.stored.nbytes for pair in matrices for matrix in pair)


def test_copies_take_room_of_the_kv_while_their_answers_run(loaded: Loaded) -> None:
    """They are shared by all answers of a request, and gone with the last of them."""
    engine, scheduler = loaded.engine, loaded.engine.scheduler
    page_bytes, plain = scheduler.limits.page_bytes, asking(None, n=2)
    engine.add(Running(1, PROMPT, plain))
    engine.step()
    alone_bytes = scheduler.kv_reserved_bytes
    asked = Running(2, PROMPT, asking(DENSITY, n=2))
    engine.add(asked)
    engine.step()
    held = loaded.stats().selection.neuron_copies_bytes
    assert held == held_tensors(loaded) > 0
    assert scheduler.kv_reserved_bytes == 2 * alone_bytes + -(-held // page_bytes) * page_bytes
    assert len([each for each in scheduler.running if each.number == 2]) == 2
    engine.check()
    engine.step()
    engine.cancel(asked)
    engine.check()
    assert loaded.stats().selection.neuron_copies_bytes == held_tensors(loaded) == 0
    assert scheduler.kv_reserved_bytes == alone_bytes
    while not engine.idle:
        engine.step()
    assert scheduler.kv_reserved_bytes == 0


def test_short_prompts_and_density_one_keep_no_copies(loaded: Loaded) -> None:
    for number, (ids, density) in enumerate([(PROMPT[:15], 0.5), (PROMPT, 1.0)]):
        sequence = Running(number, ids, asking(density))
        loaded.engine.add(sequence)
        loaded.engine.step()
        assert not sequence.pages_of_copies
        assert loaded.stats().selection.neuron_copies_bytes == held_tensors(loaded) == 0
        loaded.engine.cancel(sequence)


def test_who_does_not_fit_waits_and_who_never_can_is_told(folder: Path, tmp_path: Path) -> None:
    """A KV that holds the copies of one answer, and not of two."""
    with opened(folder, tmp_path / "probe") as loaded:
        selection, limits = loaded.engine.runner.selection, loaded.engine.scheduler.limits
        assert selection is not None
        copies = -(-selection.copies_bytes(len(PROMPT), 0.5) // limits.page_bytes)
    kv_bytes = (copies + 4) * limits.page_bytes
    with opened(folder, tmp_path / "probe", kv_memory_bytes=kv_bytes) as loaded:
        engine, wanted = loaded.engine, []
        for _ in range(2):
            (alone,) = generate_each(engine, [(PROMPT, asking(0.5))])
            wanted.append(alone.ids)
        for number in (1, 2):
            engine.add(Running(number, PROMPT, asking(0.5)))
        engine.step()
        assert (len(engine.scheduler.running), len(engine.scheduler.waiting)) == (1, 1)
        while not engine.idle:
            engine.step()
            engine.check()
        assert loaded.stats().requests_finished["length"] == 4 and wanted[0] == wanted[1]
        with pytest.raises(PromptTooLong, match="copies of neurons"):
            engine.validate(PROMPT, asking(DENSITY))
        engine.validate(PROMPT, asking(None))
