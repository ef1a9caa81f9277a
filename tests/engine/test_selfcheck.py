"""The self-check: rounding passes, a state that leaks between sequences does not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from engine_kit import opened
from moestro.engine import ModelRefused
from moestro.engine.lanes import LanePart, PackedLane
from moestro.engine.loader import Loaded
from moestro.engine.selfcheck import check_lane


def look(loaded: Loaded, *, quantized: bool) -> float:
    runner = loaded.engine.runner
    vocab_size = loaded.info.vocab_size
    assert isinstance(runner.lane, PackedLane)
    lane = PackedLane(runner.lane.model, runner.lane.cache, 3)
    return check_lane(lane, vocab_size, coarse=quantized).worst


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared"])
@pytest.mark.parametrize("name", ["native", "int8"])
def test_a_carried_model_passes(family: str, name: str, tmp_path: Path) -> None:
    folder = tiny.build(family, tmp_path / family)
    formats = {"expert_format": name, "dense_format": name}
    with opened(folder, tmp_path / "cache", **formats) as loaded:
        assert look(loaded, quantized=name != "native") < (1e-4 if name == "native" else 0.1)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_state_that_leaks_is_refused(quantized: bool, tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with opened(folder, tmp_path / "cache") as loaded:
        layer = loaded.engine.runner.lane.model.get_submodule("model.layers.1")

        def leak(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
            return output + output.cumsum(dim=1).roll(1, dims=1)  # every row sees those before it

        layer.register_forward_hook(leak)
        with pytest.raises(ModelRefused, match="in company gives other logits"):
            look(loaded, quantized=quantized)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with opened(folder, tmp_path / "cache") as loaded:
        norm = loaded.engine.runner.lane.model.get_submodule("model.norm")
        torch.nn.init.constant_(next(norm.parameters()), float("nan"))
        with pytest.raises(ModelRefused, match="not finite"):
            look(loaded, quantized=False)


def test_the_verdict_is_kept_for_each_format(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    for name in ("native", "int8"):
        with opened(folder, tmp_path / "cache", expert_format=name):
            pass
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*.checked"))
    assert kept == ["int8.native.checked", "native.native.checked"]


def test_a_verdict_that_cannot_be_read_is_made_anew(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with opened(folder, tmp_path / "cache"):
        pass
    (record,) = (tmp_path / "cache").rglob("*.checked")
    verdict = record.read_bytes()
    record.write_bytes(b"\xff\xfe" + verdict)
    with opened(folder, tmp_path / "cache"):
        assert record.read_bytes() == verdict
    record.unlink()
    record.mkdir()  # neither read nor written: checked at every start
    with opened(folder, tmp_path / "cache"):
        pass


class Differing:
    """A lane whose sequences in company have logits that differ by a share from those alone."""

    packs, keeps_states = True, False
    model = SimpleNamespace(config=SimpleNamespace(model_type="tiny"))

    def __init__(self, difference: float) -> None:
        self.difference = difference

    def run(self, parts: list[LanePart], keep: list[int]) -> torch.Tensor:
        return torch.ones(len(parts), 8) * (1 + self.difference * (len(parts) > 1))

    def forget(self, key: tuple[int, int]) -> None:
        """Nothing is held."""


def test_in_half_precision_rounding_is_said_before_it_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def worst(difference: float, dtype: torch.dtype) -> float:
        return check_lane(Differing(difference), 8, dtype, coarse=True).worst  # type: ignore[arg-type]

    assert worst(0.09, torch.bfloat16) == pytest.approx(0.09) and not caplog.records
    assert worst(0.4, torch.bfloat16) == pytest.approx(0.4)
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "bfloat16" in caplog.text and "4.0e-01" in caplog.text
    for difference, dtype in ((0.6, torch.bfloat16), (0.4, torch.float32)):
        with pytest.raises(ModelRefused, match="in company"):
            worst(difference, dtype)


def test_what_overflows_in_fp16_is_called_so() -> None:
    for dtype, words in ((torch.float16, "fp16 overflow"), (torch.bfloat16, "finite: damaged")):
        with pytest.raises(ModelRefused, match=words):
            check_lane(Differing(float("nan")), 8, dtype)  # type: ignore[arg-type]
