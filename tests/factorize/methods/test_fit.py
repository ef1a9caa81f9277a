from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from moestro.engine import Progress
from moestro.factorize import FactorizeError, Plan, make_plan
from moestro.factorize.facts import WorkFolder
from moestro.factorize.methods import stages
from moestro.factorize.methods.calibration import load_dense, read_windows
from moestro.factorize.methods.collect import LayerStack, finished_layers, layer_samples
from moestro.factorize.sources import DenseModel
from tiny_llama import byte_tokenizer, write_text


def quiet(_: Progress) -> None:
    pass


def test_it_repeats(dense: Path, texts: list[Path], plan: Plan) -> None:
    again = make_plan(dense, plan.facts.options, texts, quiet, command="the command")
    assert again.to_bytes() == plan.to_bytes()


def test_every_layer_is_reported(dense: Path, texts: list[Path], plan: Plan) -> None:
    seen: list[Progress] = []
    make_plan(dense, plan.facts.options, texts, seen.append)
    assert [notice.done for notice in seen] == [0, 1, 2, 3]
    assert {(notice.phase, notice.total) for notice in seen} == {("calibrate", 3)}


def test_the_routers_beat_chance(plan: Plan) -> None:
    assert plan.facts.router_hit > 0.77  # 3 of 4 by chance: 0.75


def test_unfit_options_are_refused_before_any_work(dense: Path, plan: Plan) -> None:
    with pytest.raises(FactorizeError, match="not enough for 33 experts"):
        make_plan(dense, replace(plan.facts.options, experts=33), [], quiet)


def test_samples_are_what_the_model_itself_computes(dense: Path) -> None:
    model = load_dense(dense)
    windows = torch.randint(3, 250, (6, 16), generator=torch.Generator().manual_seed(0))
    samples = list(layer_samples(DenseModel.open(dense), windows))
    seen: list[torch.Tensor] = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(windows)
    assert len(samples) == 3
    assert torch.allclose(samples[2].inputs, seen[0].flatten(0, 1), atol=1e-5)
    mlp = model.model.layers[2].mlp
    with torch.inference_mode():
        outputs = samples[2].neurons @ samples[2].down.T
        assert torch.allclose(outputs, mlp(samples[2].inputs), atol=1e-5)


def test_a_mistral_is_observed_like_a_llama(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    windows = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    samples = list(layer_samples(DenseModel.open(tmp_path), windows))
    model = load_dense(tmp_path)
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(windows)
    assert torch.allclose(samples[1].inputs, seen[0].flatten(0, 1), atol=1e-5)


def test_an_interrupted_run_goes_on_where_it_stopped(
    dense: Path, texts: list[Path], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run, load = LayerStack.run, LayerStack.load

    def loading(stack: LayerStack, index: int) -> Any:
        stack.loaded = index  # type: ignore[attr-defined]
        return load(stack, index)

    def running(stack: LayerStack, hidden: torch.Tensor) -> torch.Tensor:
        ran.append(stack.loaded)  # type: ignore[attr-defined]
        return run(stack, hidden)

    def stop(notice: Progress) -> None:
        if notice.done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LayerStack, "run", running)
    monkeypatch.setattr(LayerStack, "load", loading)
    again = (dense, plan.facts.options, texts)
    with pytest.raises(KeyboardInterrupt):
        make_plan(*again, stop, command="the command", work=tmp_path)
    assert set(ran) == {0, 1}
    ran.clear()
    resumed = make_plan(*again, quiet, command="the command", work=tmp_path)
    assert set(ran) == {2}
    assert resumed.to_bytes() == plan.to_bytes()
    ran.clear()
    seen: list[int] = []
    again_whole = make_plan(
        *again, lambda notice: seen.append(notice.done), command="the command", work=tmp_path
    )
    assert (ran, seen) == ([], [3]), "a whole plan is read, layer by layer"
    assert again_whole.to_bytes() == plan.to_bytes()
    other = replace(plan.facts.options, split="kmeans", router="norm", router_steps=5)
    kept = make_plan(dense, other, texts, quiet, work=tmp_path)
    assert ran == [], "another split and router observe nothing again"
    assert kept.to_bytes() == make_plan(dense, other, texts, quiet).to_bytes()
    make_plan(dense, plan.facts.options, texts[:1], quiet, work=tmp_path)
    assert set(ran) == {0, 1, 2}, "other texts are another observation"


def test_another_router_takes_the_split_as_it_is(
    dense: Path, texts: list[Path], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(plan.facts.options, router_steps=5)
    make_plan(dense, options, texts, quiet, work=tmp_path)
    monkeypatch.setattr(stages, "split_neurons", None)  # who calls it now, fails
    for changes in ({"router": "moefication", "router_hidden": 8}, {"top_k": 1}):
        other = replace(options, **changes)
        made = [make_plan(dense, other, texts, quiet, work=tmp_path) for _ in range(2)]
        assert torch.equal(made[0].order, plan.order)
        assert made[0].to_bytes() == made[1].to_bytes()
        assert made[0].facts.options == other


def test_a_damaged_work_folder_is_named(
    dense: Path, texts: list[Path], plan: Plan, tmp_path: Path
) -> None:
    make_plan(dense, plan.facts.options, texts, quiet, work=tmp_path)
    path = next(tmp_path.glob("route-*/layer-0001.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FactorizeError, match="another checksum than when written; remove") as said:
        make_plan(dense, plan.facts.options, texts, quiet, work=tmp_path)
    assert str(path.parent) in str(said.value)
    path.write_bytes(b"short")
    with pytest.raises(FactorizeError, match="is not readable"):
        make_plan(dense, plan.facts.options, texts, quiet, work=tmp_path)


def test_a_run_stopped_within_a_layer_does_that_layer_again(tmp_path: Path) -> None:
    kept = WorkFolder(tmp_path)
    assert finished_layers(kept, 3) == 0
    kept.put("layer-0000", {"inputs": torch.ones(1)})
    assert finished_layers(kept, 3) == 0
    kept.put("hidden", {"hidden": torch.ones(1), "layer": torch.tensor([0])})
    kept.put("layer-0001", {"inputs": torch.ones(1)})
    assert finished_layers(kept, 3) == 1
    kept.put("layer-0002", {"inputs": torch.ones(1)})
    assert finished_layers(kept, 3) == 3


def test_windows_come_in_turns(tmp_path: Path) -> None:
    texts = [write_text(tmp_path / f"{i}", words=100, seed=i) for i in range(2)]
    windows = read_windows(byte_tokenizer(), texts, tokens=64, window=16)
    assert windows.shape == (4, 16)
    first = byte_tokenizer()(texts[0].read_text()[:32])["input_ids"]
    assert windows[[0, 2]].flatten().tolist() == first


def test_short_and_unreadable_texts(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("short")
    with pytest.raises(FactorizeError, match="has 5 tokens of the 64"):
        read_windows(byte_tokenizer(), [text], tokens=64, window=16)
    with pytest.raises(FactorizeError, match="cannot read the text"):
        read_windows(byte_tokenizer(), [tmp_path / "none"], tokens=64, window=16)
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FactorizeError, match="cannot read the text"):
        read_windows(byte_tokenizer(), [text], tokens=64, window=16)
    with pytest.raises(FactorizeError, match="no text given"):
        read_windows(byte_tokenizer(), [], tokens=64, window=16)
