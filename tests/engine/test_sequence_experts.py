"""A prompt's statistics choose the experts of its answer: what is kept, and whom it touches."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
import tiny_families
from engine_kit import generate, generate_each, ignore, opened
from moestro.engine import BadParameter, SamplingParams, StartError
from moestro.engine.loader import Loaded
from moestro.engine.step.sequence import Batch, Part
from moestro.engine.step.sequence import Sequence as Running
from moestro.factorize import SplitOptions, apply_plan, make_plan
from tiny_llama import write_text, write_tiny_llama

PROMPT = list(range(10, 40))
TOKENS = [7, 8, 9, 10]
OTHERS = (list(range(60, 65)), list(range(80, 120)))


def asking(density: float | None, **more: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | more, expert_density=density
    )


class Steps:
    """Hand-made steps of sequences with parameters of their own."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.known = loaded, dict[int, Running]()

    def run(self, step: Sequence[tuple[int, list[int]]], **densities: float) -> torch.Tensor:
        """Logits of the parts of (number, ids); `_1=0.5`: of a new sequence 1."""
        parts, engine = [], self.loaded.engine
        for number, ids in step:
            if number not in self.known:
                params = SamplingParams(max_tokens=64, expert_density=densities.get(f"_{number}"))
                self.known[number] = Running(number, ids, params)
                self.known[number].pages = engine.scheduler.pool.take(8)
            else:
                self.known[number].token_ids += ids
            parts.append(Part(self.known[number], len(ids)))
        return engine.runner.run(Batch(tuple(parts))).logits

    def chunks(self, number: int, ids: list[int], sizes: Sequence[int], density: float) -> None:
        """A prompt in chunks of these sizes."""
        params = SamplingParams(max_tokens=64, expert_density=density)
        sequence = self.known[number] = Running(number, ids, params)
        sequence.pages = self.loaded.engine.scheduler.pool.take(8)
        for size in sizes:
            self.loaded.engine.runner.run(Batch((Part(sequence, size),)))

    def end(self) -> None:
        engine = self.loaded.engine
        for sequence in self.known.values():
            engine.runner.forget(sequence)
            engine.scheduler.pool.release(sequence.pages)

    def kept(self, number: int) -> Any:
        selection = self.loaded.engine.runner.selection
        assert selection is not None
        return selection.kept((number, 0))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """For tests that leave nothing running in it."""
    folder = tmp_path_factory.mktemp("mixtral")
    with opened(tiny.build("mixtral", folder / "model"), folder / "cache") as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("family", "expert_format"),
    [
        ("mixtral", "native"),
        ("deepseek_v3", "int8"),
        pytest.param("gpt_oss", "int4", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "native", marks=pytest.mark.slow),
        pytest.param("mixtral", "int8", marks=pytest.mark.slow),
    ],
)
def test_prompts_are_untouched_and_density_one_is_the_models_own(
    family: str, expert_format: str, tmp_path: Path
) -> None:
    folder = tiny.build(family, tmp_path / "model")
    with opened(folder, tmp_path / "cache", expert_format=expert_format) as loaded:
        found = {}
        for number, density in enumerate((None, 1.0, 0.5, 0.125)):
            steps = Steps(loaded)
            asked = {} if density is None else {f"_{number}": density}
            rows = [steps.run([(number, PROMPT)], **asked)]
            rows += [steps.run([(number, [token])]) for token in TOKENS]
            found[density] = torch.cat(rows)
    for density in (1.0, 0.5, 0.125):
        assert torch.equal(found[density][0], found[None][0])
    assert torch.equal(found[1.0], found[None])
    assert not torch.equal(found[0.125][1:], found[None][1:])


@pytest.mark.parametrize(
    ("family", "slots", "expert_format"),
    [
        ("olmoe", 3, "native"),
        pytest.param("olmoe", 32, "native", marks=pytest.mark.slow),
        pytest.param("olmoe", 32, "int8", marks=pytest.mark.slow),
        pytest.param("mixtral", 32, "native", marks=pytest.mark.slow),
    ],
)
def test_company_of_another_mode_changes_no_bit(
    family: str, slots: int, expert_format: str, tmp_path: Path
) -> None:
    folder = tiny.build(family, tmp_path / "model")
    budget = {"host_memory_bytes": slots * 48 * 1024} if expert_format == "native" else {}
    with opened(folder, tmp_path / "cache", expert_format=expert_format, **budget) as loaded:
        alone = {}
        for number, density in ((1, 0.25), (2, None), (3, 0.5)):
            steps, asked = Steps(loaded), {} if density is None else {f"_{number}": density}
            rows = [steps.run([(number, PROMPT)], **asked)]
            alone[number] = torch.cat(rows + [steps.run([(number, [token])]) for token in TOKENS])
            loaded.engine.runner.forget(steps.known[number])
        steps, found = Steps(loaded), dict[int, list[torch.Tensor]]()
        for at, ids in enumerate([PROMPT, *([token] for token in TOKENS)]):
            order = [(1, ids), (2, ids), (3, ids)][at % 3 :] + [(4 + at, OTHERS[at % 2])]
            order += [(number, ids) for number in range(1, at % 3 + 1)]
            logits = steps.run(order, _1=0.25, _3=0.5, _5=0.75)
            for (number, _), row in zip(order, logits, strict=True):
                found.setdefault(number, []).append(row)
        loaded.cache.check()
    for number, wanted in alone.items():
        assert torch.equal(torch.stack(found[number]), wanted), number
    assert not torch.equal(alone[1], alone[2]) and not torch.equal(alone[1], alone[3])


def test_a_prompt_in_chunks_keeps_what_it_keeps_whole(mixtral: Loaded) -> None:
    steps = Steps(mixtral)
    steps.chunks(1, PROMPT, [30], 0.5)
    steps.chunks(2, PROMPT, [10, 19, 1], 0.5)
    steps.run([(3, OTHERS[0]), (4, PROMPT), (5, OTHERS[1])], _4=0.5, _5=0.25)
    kept = [steps.kept(number) for number in range(1, 6)]
    steps.end()
    assert kept[0] == kept[1] == kept[3]
    assert [len(layer) for layer in kept[0]] == [4] * 4
    assert kept[2] is None
    assert [len(layer) for layer in kept[4]] == [2] * 4


@pytest.mark.parametrize("expert_format", ["native", pytest.param("int8", marks=pytest.mark.slow)])
def test_torchs_products_see_what_the_librarys_see(
    expert_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many rows and with few, in chunks, out of all slots and of the fewest."""
    folder, found = tiny.build("gpt_oss", tmp_path / "model"), []
    for products in ("library", "torch"):
        with monkeypatch.context() as patch:
            if products == "torch":
                patch.setattr("moestro.engine.formats.named.library", lambda: None)
            budget: Any = {"expert_format": expert_format}
            for _ in range(2):
                with opened(folder, tmp_path / products, **budget) as loaded:
                    steps = Steps(loaded)
                    steps.chunks(1, PROMPT, [30], 0.5)
                    steps.chunks(2, PROMPT[:16], [16], 0.5)
                    steps.chunks(3, PROMPT, [10, 19, 1], 0.5)
                    found.append([steps.kept(number) for number in (1, 2, 3)])
                    budget["host_memory_bytes"] = 2 * loaded.cache.stats().slot_bytes
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0][0] == found[0][2] != found[0][1]


@pytest.mark.slow
def test_a_lane_of_one_sequence_a_pass_has_them_too(tmp_path: Path) -> None:
    folder = tiny_families.build("minimax", tmp_path / "minimax")
    with opened(folder, tmp_path / "cache") as loaded:
        assert loaded.info.lane == "sequential"
        requests = [(PROMPT, asking(density)) for density in (None, 1.0, 0.25)]
        alone = [generate_each(loaded.engine, [request])[0].ids for request in requests]
        assert [each.ids for each in generate_each(loaded.engine, requests)] == alone
        assert loaded.stats().selection.requests["sequence"] == 4
    assert alone[0] == alone[1] and alone[0][0] == alone[2][0] and alone[0] != alone[2]


@pytest.mark.slow
def test_a_model_whose_experts_read_no_tokens_says_so(tmp_path: Path) -> None:
    folder = tiny_families.build("llama4_text", tmp_path / "llama4_text")
    with opened(folder, tmp_path / "cache") as loaded:
        with pytest.raises(BadParameter, match="experts: ") as refused:
            loaded.engine.validate(PROMPT, asking(0.5))
        assert refused.value.param == "experts"
        loaded.engine.validate(PROMPT, asking(None))
    with pytest.raises(StartError, match="--experts-mode sequence"):
        opened(folder, tmp_path / "cache", sequence_density=0.5).__enter__()


def test_shares_are_those_of_the_stock_models_activations(tmp_path: Path) -> None:
    """Of mixtral's experts, computed from what its own modules read and choose."""
    folder = tiny.build("mixtral", tmp_path / "model")
    model, wanted = tiny.oracle(folder), []

    def look(module: Any, given: Any, _: Any) -> None:
        hidden, ids = given[0], given[1]
        sums = torch.zeros(8, dtype=torch.float64)
        for row, experts in zip(hidden, ids, strict=True):
            gate_up = module.gate_up_proj[experts] @ row
            gate, up = gate_up.chunk(2, dim=1)
            energy = (torch.nn.functional.silu(gate) * up).double().square().sum(1)
            sums[experts] += energy / energy.sum()
        wanted.append(sums / len(hidden))

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(look)
    with torch.inference_mode():
        model(torch.tensor([PROMPT]))
    with opened(folder, tmp_path / "cache") as loaded:
        steps = Steps(loaded)
        steps.run([(2, OTHERS[1]), (1, PROMPT)], _1=0.5, _2=0.5)
        kept = steps.kept(1)
    assert kept == tuple(
        tuple(shares.sort(descending=True, stable=True).indices[:4].tolist()) for shares in wanted
    )


def test_a_router_chooses_among_the_kept_and_nothing_misses_once_they_are_here(
    tmp_path: Path,
) -> None:
    """A sequence that keeps 3 of 8 experts in each of 4 layers, in a cache of 12 slots."""
    folder = tiny.build("olmoe", tmp_path / "model")
    settings: Any = {"host_memory_bytes": 12 * 48 * 1024, "prefetch": False}
    with opened(folder, tmp_path / "cache", **settings) as loaded:
        steps = Steps(loaded)
        steps.run([(1, PROMPT)], _1=0.375)
        for token in range(100, 124):
            steps.run([(1, [token])])
        before = loaded.cache.stats()
        for token in range(124, 140):
            steps.run([(1, [token])])
        stats = loaded.cache.stats()
    assert stats.lookups - before.lookups == 16 * 4 * 2  # the router's two, every time
    assert stats.misses == before.misses


FACTORIZED = SplitOptions(
    experts=8, shared_neurons=16, top_k=3, calibration_tokens=1024, window_tokens=64
)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model, and the same with 8 experts of which a token takes 3."""
    folder = tmp_path_factory.mktemp("twins")
    dense = write_tiny_llama(folder / "dense")
    plan = make_plan(
        dense, FACTORIZED, [write_text(folder / "text")], ignore, command="the command"
    )
    apply_plan(plan, dense, folder / "twin", ignore)
    return dense, folder / "twin"


def test_density_one_of_a_factorized_model_is_the_dense_one(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    """The first token is chosen by the prompt's own logits, all after it by all experts."""
    model = AutoModelForCausalLM.from_pretrained(twins[0], dtype=torch.float32).eval()
    whole: dict[str, Any] = {"experts_per_token": 8}
    with opened(twins[1], tmp_path / "whole", **whole) as loaded:
        steps = Steps(loaded)
        wanted = [steps.run([(1, PROMPT)])] + [steps.run([(1, [token])]) for token in TOKENS]
        with torch.inference_mode():
            dense = model(torch.tensor([PROMPT + TOKENS])).logits[0, len(PROMPT) - 1 :]
        assert (torch.cat(wanted) - dense).abs().max() < 1e-4
        found = [steps.run([(2, PROMPT)], _2=1.0)] + [steps.run([(2, [t])]) for t in TOKENS]
        assert (torch.cat(found) - dense).abs().max() < 1e-4
    with opened(twins[1], tmp_path / "cache") as loaded:  # the KV is that of three experts
        steps, selection = Steps(loaded), loaded.engine.runner.selection
        assert selection is not None and selection.neuron_layers == 0  # the shared one stays whole
        rows = [steps.run([(number, PROMPT)], _1=1.0, _2=0.5) for number in (1, 2, 3)]
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
        assert [len(layer) for layer in steps.kept(1)] == [8, 8, 8]
        together = steps.run([(1, [7]), (2, [7]), (3, [7])])
        kv_of_three = [(4, PROMPT), (5, PROMPT), (6, PROMPT)]
        for one, density in zip(kv_of_three, (1.0, 0.5, None), strict=True):
            steps.run([one], **({} if density is None else {f"_{one[0]}": density}))
        apart = torch.cat([steps.run([(number, [7])]) for number, _ in kv_of_three])
    assert torch.equal(together, apart)
    assert len({tuple(row.tolist()) for row in together}) == 3
    for slots, sweeps in ((3, False), (18, True)):
        room_bytes = slots * loaded.cache.stats().slot_bytes
        with opened(twins[1], tmp_path / "cache", host_memory_bytes=room_bytes) as loaded:
            steps = Steps(loaded)
            for number in (1, 2, 3):
                steps.run([(number, PROMPT)], _1=1.0, _2=0.5)
            assert torch.equal(steps.run([(1, [7]), (2, [7]), (3, [7])]), together)
            assert loaded.cache.sweeping == sweeps
            ahead = loaded.cache.stats().prefetch_loads
            guessed = sum(layer.guessed for layer in loaded.stats().prefetch.layers)
            assert (ahead if sweeps else guessed) > 0


def test_a_factorized_models_sequence_misses_nothing_once_its_experts_are_here(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    """It keeps 4 of 8 experts in each of 3 layers, in a cache of 12 slots."""
    with opened(twins[1], tmp_path / "probe") as loaded:
        slot_bytes = loaded.cache.stats().slot_bytes
    settings: Any = {"host_memory_bytes": 12 * slot_bytes, "prefetch": False}
    with opened(twins[1], tmp_path / "cache", **settings) as loaded:
        assert loaded.cache.plan.slots == 12
        steps = Steps(loaded)
        steps.run([(1, PROMPT)], _1=0.5)
        steps.run([(1, [100])])
        before = loaded.cache.stats()
        for token in range(101, 121):
            steps.run([(1, [token])])
        stats = loaded.cache.stats()
    assert stats.lookups - before.lookups == 20 * 3 * 4
    assert stats.misses == before.misses


def test_without_a_router_the_prompt_is_dense_and_chooses(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its answer is the dense model's without the neurons that the prompt did not keep."""
    dense, options = twins[0], replace(FACTORIZED, router="none")
    plan = make_plan(dense, options, [write_text(tmp_path / "text")], ignore)
    apply_plan(plan, dense, tmp_path / "twin", ignore)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT + TOKENS])
    with opened(tmp_path / "twin", tmp_path / "cache") as loaded:
        assert loaded.info.sequence_density == 3 / 8 and loaded.info.experts_per_token == 8
        steps = Steps(loaded)
        whole = [steps.run([(1, PROMPT)])] + [steps.run([(1, [token])]) for token in TOKENS]
        found = [steps.run([(2, PROMPT)], _2=3 / 8)] + [steps.run([(2, [t])]) for t in TOKENS]
        kept = steps.kept(2)
    assert [len(layer) for layer in kept] == [3, 3, 3]
    with torch.inference_mode():
        wanted = model(ids).logits[0, len(PROMPT) - 1 :]
        past = model(torch.tensor([PROMPT]), use_cache=True).past_key_values
        for layer, order, experts in zip(model.model.layers, plan.order, kept, strict=True):
            gone = order[16:].view(8, -1)[[e for e in range(8) if e not in experts]].long()
            layer.mlp.down_proj.weight[:, gone.flatten()] = 0
        rest = model(torch.tensor([TOKENS]), past_key_values=past).logits[0]
    assert (torch.cat(whole) - wanted).abs().max() < 1e-4
    assert (torch.cat(found)[:1] - wanted[:1]).abs().max() < 1e-4
    assert (torch.cat(found)[1:] - rest).abs().max() < 1e-4
    assert (rest - wanted[1:]).abs().max() > 1e-2
    with pytest.raises(StartError, match="no router that could choose fewer"):
        opened(tmp_path / "twin", tmp_path / "cache", experts_per_token=3).__enter__()


def test_answers_to_one_prompt_keep_the_same_experts(mixtral: Loaded) -> None:
    params = asking(0.25, temperature=1.0, seed=5, n=3)
    engine, selection = mixtral.engine, mixtral.engine.runner.selection
    assert selection is not None
    engine.add(Running(1, PROMPT, params))
    engine.step()
    kept = [selection.kept((1, index)) for index in range(3)]
    assert kept[0] is not None and kept[0] == kept[1] == kept[2]
    while not engine.idle:
        engine.step()
        engine.check()
    assert selection.held_sequences == 0


def test_short_prompts_leave_the_choice_to_their_tokens_and_it_is_counted(mixtral: Loaded) -> None:
    before, short = mixtral.stats().selection, PROMPT[:15]
    plain, asked = generate_each(mixtral.engine, [(short, asking(None)), (short, asking(0.125))])
    generate(mixtral.engine, [PROMPT], asking(0.5))
    after = mixtral.stats().selection
    assert plain.ids == asked.ids
    for choice in ("token", "short_prompt", "sequence"):
        assert after.requests[choice] - before.requests[choice] == 1, choice
    assert after.kept_experts - before.kept_experts == 4 * 4
    assert after.known_experts - before.known_experts == 4 * 8


def test_a_request_that_ends_in_its_prompt_leaves_nothing(mixtral: Loaded) -> None:
    engine, selection = mixtral.engine, mixtral.engine.runner.selection
    assert selection is not None
    generate(engine, [PROMPT], asking(0.5, max_tokens=0))
    assert selection.held_sequences == 0
