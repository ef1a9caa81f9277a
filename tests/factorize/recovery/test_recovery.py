"""The student computes what the twin computes; repair and distillation bring it nearer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moestro.engine import Progress, ProgressFn
from moestro.factorize import FactorizeError, Plan, apply_plan
from moestro.factorize.recovery.directions import begin_along_slopes
from moestro.factorize.recovery.distill import DistillOptions, Lesson, distill
from moestro.factorize.recovery.distill import divergence as loss_and_slope
from moestro.factorize.recovery.kept import KeptFile
from moestro.factorize.recovery.recover import (
    RecoverOptions,
    recover,
    recovery_modes,
    recovery_stages,
)
from moestro.factorize.recovery.repair import RepairOptions, repair
from moestro.factorize.recovery.student import LowRank, Student, largest

EXPERTS, TOP_K = 4, 2


def quiet(_: Progress) -> None:
    pass


def windows(count: int = 8, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 250, (count, 32), generator=torch.Generator().manual_seed(seed))


def dense_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def student(dense: Path, plan: Plan) -> Student:
    return Student(dense_model(dense), plan, rank=2)


def logits(student: Student, ids: torch.Tensor, top_k: int | None) -> torch.Tensor:
    with torch.no_grad():
        return student.log_probabilities(student.hidden(ids, top_k))


def divergence(student: Student, ids: torch.Tensor) -> float:
    wanted, found = logits(student, ids, None), logits(student, ids, TOP_K)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights as they are on a processor without products of bfloat16."""
    monkeypatch.setattr("moestro.factorize.recovery.student._multiplies_bfloat16", lambda: False)


def test_without_masks_it_is_the_teacher(
    dense: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    float32_only(monkeypatch)
    model, ids = dense_model(dense), windows(2)
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
    student = Student(model, plan, rank=2)
    for top_k in (None, EXPERTS):
        assert (logits(student, ids, top_k) - wanted).abs().max() < 1e-4


def test_with_masks_it_is_the_twin(
    dense: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float32_only(monkeypatch)
    apply_plan(plan, dense, tmp_path / "twin", quiet)
    twin, ids = dense_model(tmp_path / "twin"), windows(2)
    with torch.no_grad():
        wanted = twin(ids).logits.log_softmax(-1)
    student = Student(dense_model(dense), plan, rank=2)
    assert (logits(student, ids, plan.facts.options.top_k) - wanted).abs().max() < 1e-4


def test_bfloat16_products_stay_near(student: Student, plan: Plan, dense: Path) -> None:
    """Whether this processor has them or not; the teacher and the student round alike."""
    wanted = dense_model(dense)(windows(2)).logits.log_softmax(-1)
    assert (logits(student, windows(2), None) - wanted).abs().mean() < 0.1


def test_a_mask_has_the_largest() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, -4.0]])
    assert largest(scores, 2).tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_deltas_begin_along_the_loss_s_slopes(student: Student) -> None:
    """The first right singular vectors of the gradient by each whole weight, and they add nothing.

    The gradients are made by hand: of a loss that is linear in every weight, so that all windows
    tell the same one.
    """
    draw = torch.Generator().manual_seed(2)
    wanted: list[torch.Tensor] = []
    for part in student.parts():
        outputs, inputs = part.shape
        ramp = 2.0 ** -torch.arange(min(outputs, inputs))
        left, _ = torch.linalg.qr(torch.randn(outputs, len(ramp), generator=draw))
        right, _ = torch.linalg.qr(torch.randn(inputs, len(ramp), generator=draw))
        wanted.append(left @ (ramp[:, None] * right.T))

    def slopes() -> None:
        for part, gradient in zip(student.parts(), wanted, strict=True):
            assert not (part.into.detach() @ part.out_of.detach()).any()
            ((part.into @ part.out_of) * gradient).sum().backward()

    begin_along_slopes(student.parts(), slopes, seed=0)
    for part, gradient in zip(student.parts(), wanted, strict=True):
        _, _, exact = torch.linalg.svd(gradient)
        assert part.out_of.shape == (2, part.shape[1]) and not part.into.any()
        assert ((part.out_of @ exact[:2].T).abs() - torch.eye(2)).abs().max() < 0.02


def test_more_rank_than_a_matrix_has_is_filled_up() -> None:
    part = LowRank(torch.nn.Linear(4, 3, bias=False), 6, torch.Generator().manual_seed(0))

    def slopes() -> None:
        (part.into @ part.out_of).sum().backward()

    begin_along_slopes([part], slopes, seed=0)
    assert part.out_of.shape == (6, 4) and part.into.shape == (3, 6)


def test_repair_leaves_a_whole_model_alone(student: Student) -> None:
    repair(student, windows(16), EXPERTS, RepairOptions(), quiet)
    for ffn in student.ffns:
        assert ffn.down.whole is not None and ffn.down.whole.abs().max() < 1e-3


def test_repair_brings_the_student_nearer(student: Student) -> None:
    """On windows that it has not read: the text's distribution is the same."""
    before = divergence(student, windows(8, seed=11))
    left = repair(student, windows(256), TOP_K, RepairOptions(), quiet)
    assert len(left) == len(student.ffns) and min(left) < 0.95
    assert divergence(student, windows(8, seed=11)) < 0.95 * before


def test_repair_does_not_change_the_teacher(student: Student) -> None:
    wanted, before = logits(student, windows(2), None), divergence(student, windows(2))
    repair(student, windows(64), TOP_K, RepairOptions(), quiet)
    assert torch.equal(logits(student, windows(2), None), wanted)
    assert divergence(student, windows(2)) != before


def test_behind_a_prompt_its_choice_serves(student: Student) -> None:
    """The experts of the largest mean shares of the prompt's tokens; the prompt is as it was."""
    ids, ffn = windows(2), student.ffns[0]
    inputs = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), student.active(TOP_K, 6):
        found = ffn(inputs)
    with torch.no_grad(), student.active(TOP_K):
        own = ffn(inputs)
    with torch.no_grad():
        neurons = ffn.act_fn(inputs @ ffn.gate.linear.weight.T.float())
        neurons = neurons * (inputs @ ffn.up.linear.weight.T.float())
        chosen = (inputs @ ffn.router.T).topk(TOP_K, dim=-1).indices
    assert torch.equal(found[:, :6], own[:, :6])
    for row in range(2):
        shares = torch.zeros(EXPERTS)
        for token in range(6):
            energies = {
                int(expert): float(neurons[row, token, ffn.members == expert].square().sum())
                for expert in chosen[row, token]
            }
            for expert, energy in energies.items():
                shares[expert] += energy / sum(energies.values())
        kept = {*shares.topk(TOP_K).indices.tolist(), EXPERTS}
        on = torch.tensor([int(member) in kept for member in ffn.members])
        wanted = (neurons[row, 6:] * on) @ ffn.down.linear.weight.T.float()
        assert (found[row, 6:] - wanted).norm() < 0.02 * wanted.norm()
    assert student.hidden(ids, TOP_K, 16).shape == (2, 32, 32)


def test_what_the_prompt_chose_is_learnt(student: Student) -> None:
    def apart() -> float:
        wanted = student.log_probabilities(student.hidden(windows(6), None))[:, 16:]
        found = student.log_probabilities(student.hidden(windows(6), TOP_K, 16))[:, 16:]
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    with torch.no_grad():
        before = apart()
        options = DistillOptions(
            steps=90, lessons=(Lesson(TOP_K, by_prompt=True),), into_rate=1e-2, out_of_rate=2e-3
        )
    distill(student, windows(6), options, quiet)
    with torch.no_grad():
        assert apart() < 0.85 * before


def test_distillation_brings_the_student_nearer(student: Student) -> None:
    """On what it reads: nothing can be learnt of random tokens but they themselves."""
    before = divergence(student, windows(6))
    options = DistillOptions(steps=90, lessons=(Lesson(TOP_K),), into_rate=1e-2, out_of_rate=2e-3)
    assert distill(student, windows(6), options, quiet) == 90
    assert divergence(student, windows(6)) < 0.8 * before


def test_the_slope_is_the_losses_own(
    dense: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that are no multiple of those taken together; autograd's, of the same numbers."""
    float32_only(monkeypatch)
    student = Student(dense_model(dense), plan, rank=2)
    draw = torch.Generator().manual_seed(8)
    wanted, found = (torch.randn(45, 32, generator=draw) for _ in range(2))
    loss, slope = loss_and_slope(student, wanted, found)
    found.requires_grad_()
    aim, said = student.log_probabilities(wanted), student.log_probabilities(found)
    exact = (aim.exp() * (aim - said)).sum(-1).mean()
    exact.backward()
    assert found.grad is not None and loss == pytest.approx(float(exact.detach()), rel=1e-4)
    assert (slope - found.grad).abs().max() < 1e-4 * found.grad.abs().max()


def test_the_same_seed_teaches_the_same(dense: Path, plan: Plan) -> None:
    found = []
    for _ in range(2):
        student = Student(dense_model(dense), plan, rank=2)
        distill(student, windows(6), DistillOptions(steps=4, lessons=(Lesson(TOP_K),)), quiet)
        found.append(logits(student, windows(2), TOP_K))
    assert torch.equal(*found)


def test_minutes_become_steps(student: Student) -> None:
    """Of a clock on which every step takes a quarter of a minute, and their directions half one."""
    ticks = iter((0, 30, 30 + 8 * 15))
    options = DistillOptions(minutes=3.0, lessons=(Lesson(TOP_K),))
    assert distill(student, windows(4), options, quiet, clock=lambda: next(ticks)) == 10


def test_a_loss_that_is_no_number_ends_it(student: Student) -> None:
    student.ffns[0].down.whole = torch.full((32, 48), float("inf"))
    with pytest.raises(FactorizeError, match="diverged at step"):
        distill(student, windows(4), DistillOptions(steps=4, lessons=(Lesson(TOP_K),)), quiet)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    dense: Path, plan: Plan, tmp_path: Path
) -> None:
    whole = Student(dense_model(dense), plan, rank=2)
    options = DistillOptions(steps=45, lessons=(Lesson(TOP_K),))
    distill(whole, windows(6), options, quiet)

    def stop(news: Progress) -> None:
        if news.done == 33:
            raise KeyboardInterrupt

    kept = KeptFile(tmp_path / "state", "this run")
    with pytest.raises(KeyboardInterrupt):
        stopped = Student(dense_model(dense), plan, rank=2)
        distill(stopped, windows(6), options, stop, kept=kept)
    again = Student(dense_model(dense), plan, rank=2)
    seen: list[int] = []
    distill(again, windows(6), options, steps_into(seen), kept=kept)
    assert seen == list(range(21, 46))
    assert torch.equal(logits(whole, windows(2), TOP_K), logits(again, windows(2), TOP_K))


def steps_into(seen: list[int]) -> ProgressFn:
    def note(news: Progress) -> None:
        if news.phase == "distill":
            seen.append(news.done)

    return note


def test_another_runs_state_is_not_taken(dense: Path, plan: Plan, tmp_path: Path) -> None:
    student = Student(dense_model(dense), plan, rank=2)
    options = DistillOptions(steps=20, lessons=(Lesson(TOP_K),))
    distill(student, windows(2), options, quiet, kept=KeptFile(tmp_path / "state", "one"))
    seen: list[int] = []
    other = KeptFile(tmp_path / "state", "two")
    distill(student, windows(2), options, steps_into(seen), kept=other)
    assert seen == list(range(1, 21))
    (tmp_path / "state").write_bytes(b"nothing")
    with pytest.raises(FactorizeError, match="remove it to start anew"):
        distill(student, windows(2), options, quiet, kept=KeptFile(tmp_path / "state", "one"))


@pytest.mark.parametrize(
    ("stages", "bits"), [(("repair",), 8), (("lora",), 8), (("lora",), 4), (("repair", "lora"), 8)]
)
def test_what_recovery_gives_is_what_it_has_learnt(
    stages: tuple[str, ...], bits: int, dense: Path, plan: Plan
) -> None:
    """The dense weights with the deltas predict what the student does."""
    options = RecoverOptions(stages, steps=12, rank=8, bits=bits)
    student_model = dense_model(dense)
    recovered, deltas = recover(student_model, plan, windows(64), options, quiet, "the command")
    deltas.check_fits(3, 48, 32, recovered.sha256)
    assert ("down.whole" in deltas.tensors) == ("repair" in stages)
    assert ("gate.into" in deltas.tensors) == ("lora" in stages)
    assert deltas.bits == bits and (bits == 8 or "rank 8 in int4" in deltas.facts.method)
    rebuilt = dense_model(dense)
    for number, layer in enumerate(rebuilt.model.layers):
        for part in ("gate", "up", "down"):
            weight = layer.mlp.get_submodule(f"{part}_proj").weight
            weight.data = deltas.add_to(weight.detach(), part, number)
    with torch.no_grad():
        found = Student(rebuilt, recovered, 1)
        wanted = [layer.mlp for layer in student_model.model.layers]
        inputs = torch.randn(4, 32)
        for ffn, learnt in zip(found.ffns, wanted, strict=True):
            ffn.top_k = learnt.top_k = TOP_K
            assert (ffn(inputs) - learnt(inputs)).norm() < 0.02 * learnt(inputs).norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_recovery_goes_on_from_deltas(
    bits: int, dense: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it begins with is what the first one gave."""
    float32_only(monkeypatch)
    options = RecoverOptions(steps=12, rank=4, bits=bits)
    recovered, deltas = recover(dense_model(dense), plan, windows(64), options, quiet)
    first = Student(dense_model(dense), recovered, 6, deltas)
    rebuilt = dense_model(dense)
    for number, layer in enumerate(rebuilt.model.layers):
        for part in ("gate", "up", "down"):
            weight = layer.mlp.get_submodule(f"{part}_proj").weight
            weight.data = deltas.add_to(weight.detach(), part, number)
    wanted = Student(rebuilt, recovered, 1)
    for ids in windows(2), windows(3, seed=4):
        found = logits(first, ids, TOP_K)
        assert (found - logits(wanted, ids, TOP_K)).abs().max() < 1e-4
    more = RecoverOptions(("lora",), steps=5, rank=4, modes=("token", "sequence"))
    model = dense_model(dense)
    last, summed = recover(model, recovered, windows(4), more, quiet, start=deltas)
    before = [ffn.gate.into for ffn in Student(dense_model(dense), recovered, 4, deltas).ffns]
    after = [layer.mlp.gate.into for layer in model.model.layers]
    farthest = max(float((b - a).detach().abs().max()) for a, b in zip(before, after, strict=True))
    assert 0 < farthest < 4e-4, "a run that goes on takes small steps"
    assert summed.facts.steps == 17 and summed.facts.tokens == 68 * 32
    assert torch.equal(summed.tensors["down.whole"], deltas.tensors["down.whole"])
    assert not torch.equal(summed.tensors["up.into"], deltas.tensors["up.into"])
    assert "modes token, sequence" in last.facts.method
    summed.check_fits(3, 48, 32, last.sha256)


@pytest.mark.parametrize(("asked", "rank"), [(None, 4), (2, 2)])
def test_deltas_go_on_with_their_rank_or_cut_to_the_largest(
    asked: int | None, rank: int, dense: Path, plan: Plan
) -> None:
    options = RecoverOptions(("lora",), steps=6, rank=4)
    recovered, deltas = recover(dense_model(dense), plan, windows(4), options, quiet)
    more = RecoverOptions(("lora",), steps=1, rank=asked)
    _, cut = recover(dense_model(dense), recovered, windows(4), more, quiet, start=deltas)
    assert cut.rank == rank
    begun = Student(dense_model(dense), recovered, rank, deltas).ffns[1].up
    whole = Student(dense_model(dense), recovered, 4, deltas).ffns[1].up
    left, values, right = torch.linalg.svd((whole.into @ whole.out_of).detach())
    nearest = left[:, :rank] * values[:rank] @ right[:rank]
    assert (begun.into @ begun.out_of - nearest).norm() < 0.02 * values[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (RecoverOptions(recovery_stages("prune, repair")), "not prune"),
        (RecoverOptions(recovery_stages("")), "not none"),
        (RecoverOptions(rank=0), "above zero"),
        (RecoverOptions(bits=5), "4 or 8 bits a number, not 5"),
        (RecoverOptions(modes=recovery_modes("layer,token")), "token and sequence, not layer"),
        (RecoverOptions(modes=recovery_modes(" ")), "not none"),
    ],
)
def test_unfit_options_are_refused(options: RecoverOptions, words: str) -> None:
    with pytest.raises(FactorizeError, match=words):
        options.check()
