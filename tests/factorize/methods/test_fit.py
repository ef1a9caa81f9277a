from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moestro.engine import Progress
from moestro.factorize import FactorizeError, Plan, make_plan
from moestro.factorize.methods.calibration import layer_samples, load_dense, read_windows
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
    with pytest.raises(FactorizeError, match="multiple of 5"):
        make_plan(dense, replace(plan.facts.options, experts=5), [], quiet)


def test_samples_are_what_the_model_itself_computes(dense: Path) -> None:
    model = load_dense(dense)
    windows = torch.randint(3, 250, (6, 16), generator=torch.Generator().manual_seed(0))
    samples = list(layer_samples(model, windows, batch=4))
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
