import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moestro.factorize import FactorizeError, Plan, SourceRefused, SplitOptions


def test_a_plan_comes_back_as_it_was(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "plan.safetensors")
    again = Plan.read(tmp_path / "plan.safetensors")
    assert torch.equal(again.order, plan.order)
    assert torch.equal(again.routers, plan.routers)
    assert again.facts == plan.facts
    assert again.sha256 == plan.sha256
    assert again.to_bytes() == (tmp_path / "plan.safetensors").read_bytes()


def test_what_it_remembers(plan: Plan) -> None:
    assert plan.facts.source == "tiny"
    assert plan.facts.command == "the command"
    assert (plan.order.dtype, plan.routers.dtype) == (torch.int16, torch.float16)
    assert tuple(plan.routers.shape) == (3, 4, 32)


def test_other_files_are_not_plans(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    for write in (
        lambda: None,
        lambda: path.write_bytes(b"not a safetensors file"),
        lambda: save_file({"order": torch.zeros(1)}, path, {"format": "pt"}),
        lambda: save_file({"order": torch.zeros(1)}, path, {"moestro.plan": "{}"}),
    ):
        write()
        with pytest.raises(FactorizeError, match="is not a plan"):
            Plan.read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: [], "no JSON object"),
        (lambda facts: facts | {"format": 9}, "does not read"),
        (lambda facts: facts | {"options": 3}, "3 is not an object"),
        (lambda facts: facts | {"options": facts["options"] | {"top_k": "3"}}, "top_k is '3'"),
        (lambda facts: facts | {"options": facts["options"] | {"experts": 0}}, "experts is 0"),
        (lambda facts: facts | {"source": None}, "source is None, not text"),
        (lambda facts: facts | {"router_hit": "most"}, "router_hit is 'most', not a number"),
        (lambda facts: facts | {"more": 1}, "'more' is no field"),
    ],
)
def test_a_plan_of_wrong_facts_is_refused(
    plan: Plan, tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    path = tmp_path / "wrong.safetensors"
    facts = json.loads(json.dumps({"format": 1, **asdict(plan.facts)}))
    tensors = {"order": plan.order, "routers": plan.routers}
    save_file(tensors, path, {"moestro.plan": json.dumps(change(facts))})
    with pytest.raises(FactorizeError, match=words) as caught:
        Plan.read(path)
    assert str(path) in str(caught.value)


def test_a_plan_that_names_a_neuron_twice(plan: Plan) -> None:
    order = plan.order.clone()
    order[1, 0] = order[1, 1]
    broken = replace(plan, order=order)
    with pytest.raises(SourceRefused, match="every neuron once"):
        broken.check_fits(3, 48, 32, plan.facts.source_sha256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SplitOptions(experts=5, shared_neurons=16, top_k=2), "multiple of 5 experts"),
        (SplitOptions(experts=4, shared_neurons=48, top_k=2), "leave 0"),
        (SplitOptions(experts=4, shared_neurons=-8, top_k=2), "positive multiple"),
        (SplitOptions(experts=4, shared_neurons=16, top_k=5), "5 of 4 experts"),
        (SplitOptions(experts=4, shared_neurons=16, top_k=0), "0 of 4 experts"),
        (SplitOptions(experts=1, shared_neurons=16, top_k=1), "at least 2"),
    ],
)
def test_splits_that_do_not_work_out(options: SplitOptions, words: str) -> None:
    with pytest.raises(FactorizeError, match=words):
        options.expert_neurons(48)
