"""What a layer asks of a GPU for one token, all experts there: a number that may only fall.

Each operation costs the host about 5 us, which is what decoding takes there (not the products).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import tiny
from engine_kit import opened, run_logits
from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from virtual_device import Operation

WIDTHS: dict[str, Any] = {**tiny.WIDTHS, "num_hidden_layers": 2}
QWEN3: dict[str, Any] = {**WIDTHS, "head_dim": 16}
LIKE: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **QWEN3, moe_intermediate_size=32, num_experts=128, num_experts_per_tok=8
    ),
    "mixtral": lambda: hf.MixtralConfig(**WIDTHS, num_local_experts=8, num_experts_per_tok=2),
}
VIEWS = ("_unsafe_view",)  # by their schema they are none
MOST = {"qwen3_moe": 81, "mixtral": 53}
"""Kernels and copies. Raise neither: a layer that asks for more makes every token slower."""


@pytest.mark.parametrize("name", LIKE)
def test_a_layer_asks_for_no_more_than_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the modes are those of one thread
    folder = tiny.save(LIKE[name](), tmp_path / "model", torch.bfloat16)
    cuda, marks = FakeCuda(Gpu(4 << 30)), list[int]()

    def note(*_: object) -> None:
        marks.append(len(cuda.timeline.queued))

    prompts = [(n, [(7 * n + 3 * i) % 250 for i in range(100)]) for n in range(4)]
    with installed(cuda), opened(folder, tmp_path / "cache", device="cuda") as loaded:
        last = loaded.engine.runner.lane.model.get_submodule("model.layers.1")
        last.register_forward_pre_hook(note)
        last.register_forward_hook(note)
        run_logits(loaded, [prompts, [(0, [8])], [(0, [9])]])
    begun, ended = marks[-2:]
    queued: list[Operation] = cuda.timeline.queued[begun:ended]
    assert not [each.name for each in queued if each.engine is cuda.to_device], "experts were there"
    launched = [each.name for each in queued if each.name not in VIEWS]
    assert len(launched) <= MOST[name], launched
