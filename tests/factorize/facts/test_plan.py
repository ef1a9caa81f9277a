import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moestro.factorize
from moestro.factorize import FactorizeError, Plan, SourceRefused, SplitOptions, demo_plan
from moestro.factorize.facts import RouterWeights
from moestro.factorize.facts.plan import BYTES_FORMAT
from moestro.factorize.facts.router_weights import narrow, widen


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
@pytest.mark.parametrize("number", [1, 2])
def test_a_plan_of_wrong_facts_is_refused(
    number: int,
    plan: Plan,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    words: str,
) -> None:
    path = tmp_path / "wrong.safetensors"
    replace(plan, format=number).write(path)
    facts, tensors = parts_of(path)
    save_file(tensors, path, {"moestro.plan": json.dumps(change(facts))})
    with pytest.raises(FactorizeError, match=words) as caught:
        Plan.read(path)
    assert str(path) in str(caught.value)


def parts_of(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["moestro.plan"])
        return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_first_format_is_read_and_keeps_its_bytes(plan: Plan, tmp_path: Path) -> None:
    replace(plan, format=1).write(tmp_path / "plan.safetensors")
    facts, tensors = parts_of(tmp_path / "plan.safetensors")
    assert (facts["format"], sorted(tensors)) == (1, ["order", "routers"])
    assert not facts["options"].keys() & {"split", "router", "scale"}
    again = Plan.read(tmp_path / "plan.safetensors")
    options = again.facts.options
    assert (options.split, options.router, options.scale) == ("coactivation", "ridge", "one")
    assert again.scales.tolist() == [1.0, 1.0, 1.0]
    assert again.to_bytes() == (tmp_path / "plan.safetensors").read_bytes()


def test_routers_in_bytes_come_back_as_they_are(plan: Plan, tmp_path: Path) -> None:
    """Rounded once, by at most half of 1 / 64 of a row's largest number, and not again."""
    wide = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3))
    wide[0, 1] = 0.0
    rounded = RouterWeights(widen(*narrow(wide)))
    bytes_plan = replace(plan, router_weights=rounded, format=BYTES_FORMAT)
    bytes_plan.write(tmp_path / "plan.safetensors")
    facts, tensors = parts_of(tmp_path / "plan.safetensors")
    assert (facts["format"], tensors["routers"].dtype) == (3, torch.int8)
    again = Plan.read(tmp_path / "plan.safetensors")
    assert again.sha256 == bytes_plan.sha256 != plan.sha256
    assert torch.equal(again.routers, bytes_plan.routers)
    lost = (bytes_plan.routers.double() - wide).abs().amax(dim=-1)
    assert (lost <= wide.abs().amax(dim=-1) / 127).all() and lost.max() > 0
    assert torch.equal(widen(*narrow(again.routers)), again.routers)
    tensors["router_exponents"] = tensors["router_exponents"].short()
    save_file(tensors, tmp_path / "other", {"moestro.plan": json.dumps(facts)})
    with pytest.raises(FactorizeError, match="exponents in torch.int16"):
        Plan.read(tmp_path / "other")


def test_the_plan_in_the_package_is_the_one_that_folders_name() -> None:
    shipped = Path(moestro.factorize.__path__[0]) / "demo_plan.safetensors"
    named = "9a07f629834e99f366308e0adc6557f3f22fa8850ae79dc460ab04d0812042ac"
    assert demo_plan().sha256 == hashlib.sha256(shipped.read_bytes()).hexdigest() == named


@pytest.mark.parametrize("change", ["a word", "a number", "a scale"])
def test_a_plan_that_was_damaged_is_refused(change: str, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan.write(path)
    facts, tensors = parts_of(path)
    if change == "a word":
        facts["command"] = "another"
    elif change == "a number":
        tensors["order"][0, :2] = tensors["order"][0, :2].flip(0)
    else:
        tensors["scales"][1] = 2.0
    save_file(tensors, path, {"moestro.plan": json.dumps(facts)})
    with pytest.raises(FactorizeError, match="another checksum"):
        Plan.read(path)


def test_routers_with_more_than_a_matrix_come_back(plan: Plan, tmp_path: Path) -> None:
    routers = RouterWeights(
        torch.ones(3, 4, 8).half(), torch.ones(3, 8, 32).half(), torch.ones(3, 4).half(), "relu"
    )
    rich = replace(plan, router_weights=routers)
    rich.write(tmp_path / "plan.safetensors")
    again = Plan.read(tmp_path / "plan.safetensors")
    assert again.sha256 == rich.sha256
    assert again.router_weights.activation == "relu"
    for name, part in again.router_weights.tensors().items():
        assert torch.equal(part, routers.tensors()[name])
    again.check_fits(3, 48, 32, plan.facts.source_sha256)
    with pytest.raises(FactorizeError, match="a first layer with relu and a bias, which no stock"):
        again.check_carried()


@pytest.mark.parametrize("activation", ["", "gelu", 3])
def test_a_first_layer_needs_its_activation(activation: object, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    replace(plan, router_weights=replace(plan.router_weights, first=torch.ones(3, 32, 32))).write(
        path
    )
    facts, tensors = parts_of(path)
    facts["router_activation"] = activation
    save_file(tensors, path, {"moestro.plan": json.dumps(facts)})
    with pytest.raises(FactorizeError, match="does not fit the router's layers"):
        Plan.read(path)


def test_a_plan_that_names_a_neuron_twice(plan: Plan) -> None:
    order = plan.order.clone()
    order[1, 0] = order[1, 1]
    broken = replace(plan, order=order)
    with pytest.raises(SourceRefused, match="every neuron once"):
        broken.check_fits(3, 48, 32, plan.facts.source_sha256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SplitOptions(experts=33, shared_neurons=16, top_k=2), "not enough for 33 experts"),
        (SplitOptions(experts=4, shared_neurons=48, top_k=2), "leave 0"),
        (SplitOptions(experts=4, shared_neurons=-8, top_k=2), "leave 56"),
        (SplitOptions(experts=4, shared_neurons=16, top_k=5), "5 of 4 experts"),
        (SplitOptions(experts=4, shared_neurons=16, top_k=0), "0 of 4 experts"),
        (SplitOptions(experts=1, shared_neurons=16, top_k=1), "at least 2"),
        (SplitOptions(split="best"), "no split 'best'; choose one of coactivation, kmeans"),
        (SplitOptions(router="best"), "no router 'best'"),
        (SplitOptions(scale="two"), "no scale 'two'; choose one of one, calibrated, inverse-k"),
        (SplitOptions(router="norm", router_steps=0), "at least one step"),
        (SplitOptions(router_hidden=8), "only trained routers"),
        (SplitOptions(router="none", router_bias=1), "only trained routers"),
        (SplitOptions(router="none", scale="calibrated"), "scale one alone, not calibrated"),
    ],
)
def test_splits_that_do_not_work_out(options: SplitOptions, words: str) -> None:
    with pytest.raises(FactorizeError, match=words):
        options.expert_neurons(48)


def test_tau_is_said_where_it_is_not_one(plan: Plan, tmp_path: Path) -> None:
    for tau, said in ((1.0, False), (0.25, True)):
        chosen = replace(
            plan, facts=replace(plan.facts, options=replace(plan.facts.options, tau=tau))
        )
        chosen.write(tmp_path / "plan.safetensors")
        assert ("tau" in parts_of(tmp_path / "plan.safetensors")[0]["options"]) == said
        again = Plan.read(tmp_path / "plan.safetensors")
        assert again.facts.options.tau == tau and again.sha256 == chosen.sha256
        assert again.needs_router_file == said
    with pytest.raises(FactorizeError, match="a threshold tau of 0.25, which no stock"):
        again.check_carried()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SplitOptions(router="norm", tau=1.5), "tau is between 0"),
        (SplitOptions(tau=0.5), "needs the router norm and the scale one, not ridge and one"),
        (SplitOptions(router="norm", scale="inverse-k", tau=0.5), "not norm and inverse-k"),
    ],
)
def test_a_threshold_needs_foretold_norms(options: SplitOptions, words: str) -> None:
    with pytest.raises(FactorizeError, match=words):
        options.expert_neurons(2304)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SplitOptions(layer_top_k="12 x"), "1 to 24 experts per token, not '12 x'"),
        (SplitOptions(layer_top_k="25 1"), "1 to 24 experts per token"),
        (SplitOptions(layer_top_k="0 24"), "1 to 24 experts per token"),
        (SplitOptions(layer_top_k="24 2"), "13.00 experts per token on average"),
        (SplitOptions(layer_top_k="20 4", router="none"), "the prompt chooses, in all layers"),
    ],
)
def test_layers_that_do_not_work_out(options: SplitOptions, words: str) -> None:
    with pytest.raises(FactorizeError, match=words):
        options.expert_neurons(1536)


def test_layers_are_said_where_they_differ(plan: Plan, tmp_path: Path) -> None:
    uneven = plan.with_layers("4 3 2", "as given")
    uneven.write(tmp_path / "plan.safetensors")
    again = Plan.read(tmp_path / "plan.safetensors")
    assert again.sha256 == uneven.sha256 != plan.sha256
    assert again.layer_counts == (4, 3, 2) and plan.layer_counts == (3, 3, 3)
    assert b"layer_top_k" not in plan.to_bytes()
    for layers, words in (("4 2", "2 layers' experts"), ("4 3 x", "1 to 4 experts per token")):
        with pytest.raises(FactorizeError, match=words):
            plan.with_layers(layers, "as given")
    inverse = replace(plan.facts, options=replace(plan.facts.options, scale="inverse-k"))
    with pytest.raises(FactorizeError, match="scale inverse-k was made for its layers' numbers"):
        replace(plan, facts=inverse).with_layers("4 3 2", "as given")


@pytest.mark.parametrize("layers", ["4 3 x", "4 3 9", "0 3 3"])
def test_a_plan_of_layers_that_cannot_be_is_refused(
    layers: str, plan: Plan, tmp_path: Path
) -> None:
    """Whole, and with its checksum."""
    options = replace(plan.facts.options, layer_top_k=layers)
    replace(plan, facts=replace(plan.facts, options=options)).write(tmp_path / "plan.safetensors")
    with pytest.raises(FactorizeError, match="1 to 4 experts per token"):
        Plan.read(tmp_path / "plan.safetensors")


def test_a_plan_that_is_in_use_can_be_written_over(plan: Plan, tmp_path: Path) -> None:
    """Its tensors are mapped from the file: `--plan P --write-plan P` reads and writes one."""
    path = tmp_path / "plan.safetensors"
    plan.write(path)
    mapped = Plan.read(path)
    replace(plan, order=plan.order.flip(1), scales=plan.scales * 3).write(path)
    assert torch.equal(mapped.order, plan.order) and torch.equal(mapped.scales, plan.scales)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
