"""What the study masks in the dense model is what the factorized twin computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from study.accuracy import Encoded, lay_out, log_likelihoods, rows_of
from study.quality import bytes_per_token, kl_sum, measure_quality
from study.simulate import (
    Experts,
    Griffin,
    Oracle,
    Sections,
    Simulation,
    column_lengths,
)
from transformers import AutoConfig

from moestro.factorize import SplitOptions, apply_plan, make_plan
from moestro.factorize.evaluate import load_model
from moestro.factorize.methods import load_dense
from tiny_dense import write_tiny_dense

IDS = torch.randint(3, 290, (64,), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dense(tmp_path_factory.mktemp("source"), "llama")


@pytest.fixture(scope="module")
def dense(source: Path) -> Any:
    return load_dense(source)


def logits(simulation: Simulation, ids: torch.Tensor = IDS) -> torch.Tensor:
    return simulation.logits(simulation.hidden(ids, Sections.halves(len(ids))))


@pytest.mark.parametrize(("split", "router"), [("coactivation", "ridge"), ("random", "prior")])
def test_the_simulation_is_the_stock_model_of_the_served_folder(
    source: Path, dense: Any, tmp_path: Path, split: str, router: str
) -> None:
    options = SplitOptions(
        experts=4,
        shared_neurons=16,
        top_k=2,
        calibration_tokens=256,
        window_tokens=64,
        split=split,
        router=router,
        router_steps=5,
    )
    plan = make_plan(source, options, (), lambda _: None)
    if router == "prior":  # and layers with numbers of their own
        plan = plan.with_layers(" ".join("312"[: len(plan.order)]), "as given")
    apply_plan(plan, source, tmp_path / "served", lambda _: None)
    counted: list[torch.Tensor] = []
    for top_k in (1, 2, 4):
        with torch.inference_mode():
            served = load_model(tmp_path / "served", top_k)(IDS[None]).logits[0]
        found = logits(Simulation(dense, Experts(plan, top_k, counted)))
        torch.testing.assert_close(found, served, rtol=0, atol=1e-4)
        assert (torch.equal(found, logits(Simulation(dense, None)))) == (top_k == 4)
    layers = len(plan.order)
    widths = [each.shape[1] for each in counted[: 2 * layers]]
    if router == "ridge":
        assert widths == [1] * layers + [2] * layers
    assert widths[layers:] == list(plan.layer_counts)


def test_the_dense_model_is_left_as_it_was(dense: Any) -> None:
    before = logits(Simulation(dense, None))
    changed = logits(Simulation(dense, Oracle(24, column_lengths(dense))))
    assert not torch.allclose(before, changed)
    assert torch.equal(before, logits(Simulation(dense, None)))
    assert torch.equal(before, logits(Simulation(dense, Oracle(48, column_lengths(dense)))))


def test_the_oracle_keeps_the_largest_contributions() -> None:
    neurons = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
    lengths = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
    found = Oracle(2, lengths)(0, torch.empty(1, 1), neurons, Sections.halves(1))
    assert found.tolist() == [[1.0, -3.0, 0.0, 0.0]]


def test_each_prompt_chooses_the_neurons_of_what_follows_it_alone() -> None:
    sections = Sections(torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, False]))
    neurons = torch.tensor([[4.0, 1.0], [7.0, 8.0], [1.0, -2.0], [5.0, 6.0]])
    found = Griffin(1)(0, torch.empty(4, 1), neurons, sections)
    assert found.tolist() == [[4.0, 1.0], [7.0, 0.0], [1.0, -2.0], [0.0, 6.0]]


def test_a_prompt_runs_whole(dense: Any) -> None:
    plain, chosen = logits(Simulation(dense, None)), logits(Simulation(dense, Griffin(24)))
    torch.testing.assert_close(chosen[:32], plain[:32])
    assert float((chosen[32:] - plain[32:]).abs().max()) > 1e-2


def test_quality_of_the_dense_model_itself(dense: Any) -> None:
    windows = IDS.view(1, 2, 32)
    simulation = Simulation(dense, None)
    hidden = torch.stack([simulation.hidden(ids, Sections.halves(32)) for ids in windows[0]])
    values = measure_quality(simulation, windows, hidden, after_prompt=False)
    assert values["kl"] == pytest.approx(0, abs=1e-6)
    with torch.inference_mode():
        wanted = dense(windows[0][1:], labels=windows[0][1:]).loss
    assert values["losses"][0][1] == pytest.approx(float(wanted), abs=1e-4)
    masked = Simulation(dense, Oracle(24, column_lengths(dense)))
    assert measure_quality(masked, windows, hidden, after_prompt=True)["kl"] > 0


def test_divergence_of_two_known_distributions() -> None:
    one, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    wanted = 0.5 * torch.tensor([2.0, 2 / 3]).log().sum()
    assert kl_sum(one, other) == pytest.approx(float(wanted))
    assert kl_sum(one, one + 3) == pytest.approx(0, abs=1e-6)


QUESTIONS = [
    Encoded([5, 6, 7], [[8, 9], [10]]),
    Encoded([11], [[12, 13, 14], [15, 16], [17]]),
    Encoded([20, 21], [[22], [23, 24]]),
]


def test_questions_that_share_a_row_are_answered_as_if_alone(dense: Any) -> None:
    found = log_likelihoods(Simulation(dense, None), lay_out(QUESTIONS))
    for question, scores in zip(QUESTIONS, found, strict=True):
        for tokens, score in zip(question.continuations, scores, strict=True):
            ids = torch.tensor([*question.context, *tokens])
            with torch.inference_mode():
                rows = dense(ids[None]).logits[0].log_softmax(-1)
            start = len(question.context)
            wanted = sum(float(rows[n - 1, int(ids[n])]) for n in range(start, len(ids)))
            assert score == pytest.approx(wanted, abs=1e-4)


def test_a_row_is_filled_in_order_and_a_long_question_has_its_own() -> None:
    assert [q.tokens for q in QUESTIONS] == [6, 7, 5]
    assert list(rows_of(QUESTIONS, most=13)) == [[0, 1], [2]]
    assert list(rows_of(QUESTIONS, most=3)) == [[0], [1], [2]]


def test_bytes_of_a_token() -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    layer = (64 + 32 + 32 + 64) + 16 + 3 * 8 * 5 + 8 * 3
    assert bytes_per_token(config, 5, 3) == 2 * (2 * layer + 8 + 80)
