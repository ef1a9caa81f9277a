"""Layers with different numbers of experts: the student has them, and measures which are best."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moestro.engine import Progress
from moestro.factorize import FactorizeError, Plan, apply_plan
from moestro.factorize.evaluate import load_model
from moestro.factorize.recovery.layer_losses import measured_layers
from moestro.factorize.recovery.student import Student

EXPERTS = 4


def quiet(_: Progress) -> None:
    pass


def windows(count: int = 8) -> torch.Tensor:
    return torch.randint(3, 250, (count, 32), generator=torch.Generator().manual_seed(3))


def dense_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(
    student: Student, ids: torch.Tensor, top_k: int | None, prompt_tokens: int | None = None
) -> torch.Tensor:
    with torch.no_grad():
        return student.log_probabilities(student.hidden(ids, top_k, prompt_tokens))


@pytest.fixture(autouse=True)
def float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights as they are on a processor without products of bfloat16."""
    monkeypatch.setattr("moestro.factorize.recovery.student._multiplies_bfloat16", lambda: False)


@pytest.mark.parametrize("asked", [3, 1, 4])
def test_layers_with_numbers_of_their_own_are_the_twins(
    asked: int, dense: Path, plan: Plan, tmp_path: Path
) -> None:
    uneven = plan.with_layers("4 3 2", "as given")
    apply_plan(uneven, dense, tmp_path / "twin", quiet)
    ids = windows(2)
    with torch.no_grad():
        wanted = load_model(tmp_path / "twin", asked)(ids).logits.log_softmax(-1)
    student = Student(dense_model(dense), uneven, rank=2)
    assert (logits(student, ids, asked) - wanted).abs().max() < 1e-4


def test_layers_are_measured_on_a_text(dense: Path, plan: Plan) -> None:
    """As many experts in all as before, and nearer to the dense model on that text."""
    ids = windows()
    counts = measured_layers(dense_model(dense), plan, ids, quiet)
    assert counts != plan.layer_counts and sum(counts) <= sum(plan.layer_counts)
    uneven = plan.with_layers(" ".join(map(str, counts)), "as measured")
    assert whole_divergence(dense, uneven, ids) < whole_divergence(dense, plan, ids)


@pytest.mark.parametrize("by_prompt", [False, True])
def test_what_a_layer_loses_is_what_the_whole_model_does(
    dense: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, by_prompt: bool
) -> None:
    monkeypatch.setattr("moestro.factorize.recovery.layer_losses.STRIDE", 1)
    monkeypatch.setattr("moestro.factorize.recovery.layer_losses.SURE", 0.0)
    seen: list[list[dict[int, float]]] = []

    def all_alike(losses: list[dict[int, float]], total: int) -> tuple[int, ...]:
        seen.append(losses)
        return plan.layer_counts

    monkeypatch.setattr("moestro.factorize.recovery.layer_losses.least_loss", all_alike)
    measured_layers(dense_model(dense), plan, windows(), quiet, by_prompt=by_prompt)
    counts = list(plan.layer_counts)
    counts[1] = EXPERTS
    uneven = plan.with_layers(" ".join(map(str, counts)), "as measured")
    prompt_tokens = 16 if by_prompt else None
    more, usual = (whole_divergence(dense, x, windows(), prompt_tokens) for x in (uneven, plan))
    assert seen[0][1][EXPERTS] == pytest.approx(more - usual, abs=1e-5)


def test_layers_that_do_more_together_are_not_measured(dense: Path, plan: Plan) -> None:
    model = dense_model(dense)
    model.model.register_forward_pre_hook(scaled, with_kwargs=True)
    with pytest.raises(FactorizeError, match="give each layer's number to --layer-top-k"):
        measured_layers(model, plan, windows(), quiet)


def scaled(module: Any, given: tuple[torch.Tensor], keywords: dict[str, Any]) -> Any:
    """As families do that multiply what they embed."""
    return (), {**keywords, "inputs_embeds": 3 * module.embed_tokens(given[0])}


def whole_divergence(
    dense: Path, plan: Plan, ids: torch.Tensor, prompt_tokens: int | None = None
) -> float:
    """At all places but the last, or those behind a prompt; as many experts as the plan says."""
    student, top_k = Student(dense_model(dense), plan, rank=1), plan.facts.options.top_k
    judged = slice(prompt_tokens or 0, -1)
    wanted = logits(student, ids, None)[:, judged]
    found = logits(student, ids, top_k, prompt_tokens)[:, judged]
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())
