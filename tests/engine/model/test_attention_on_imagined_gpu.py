"""A GPU's ways through attention give what the CPU's gives, without its masks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from engine_kit import opened, run_logits
from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from moestro.engine import EngineConfig
from moestro.engine.facts.device import Device, choose
from moestro.engine.model.attention import MaskRule

STEPS = [
    [(1, [5, 6, 7, 8, 9, 10, 11, 12, 13]), (2, [30, 31])],
    [(1, [60, 61, 62, 63, 64]), (2, [32])],  # a prompt goes on, beside one that decodes
    [(1, [65]), (2, [33])],
]


def _fine(*, grouped_heads: bool) -> Callable[[EngineConfig], Device]:
    """The GPU that is there, computing in fp32."""
    own = {"compute_dtype": torch.float32, "grouped_heads": grouped_heads}
    return lambda config: replace(choose(config), **own)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "grouped_heads"),
    [
        ("mixtral", True),
        ("gpt_oss", True),
        pytest.param("mixtral", False, marks=pytest.mark.slow),
    ],
)
def test_it_gives_what_the_cpu_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, grouped_heads: bool
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the modes are those of one thread
    folder = tiny.build(family, tmp_path / "model")
    with opened(folder, tmp_path / "here") as loaded:
        here = run_logits(loaded, STEPS)
    masked = set[tuple[str, bool]]()
    evaluate = MaskRule.evaluate

    def noting(rule: MaskRule, start: int, new_tokens: int, device: torch.device) -> torch.Tensor:
        masked.add((device.type, new_tokens == 1))
        return evaluate(rule, start, new_tokens, device)

    choose_device = _fine(grouped_heads=grouped_heads)
    with (
        installed(FakeCuda(Gpu(4 << 30))),
        opened(folder, tmp_path / "there", device="cuda", choose_device=choose_device) as loaded,
    ):
        monkeypatch.setattr(MaskRule, "evaluate", noting)
        there = run_logits(loaded, STEPS).cpu()
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    # gpt-oss has windows; what sees one new token is told on the host
    assert masked == ({("cuda", False), ("cpu", True)} if family == "gpt_oss" else set())
