"""A GPU that is lost ends the engine with the reason; one whose memory ran out ends a step."""

from pathlib import Path

import pytest

import tiny
from engine_kit import generate, opened
from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from moestro.engine import DeviceLost, SamplingParams
from moestro.engine.step.core import STEP_FAILED

GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9]]
MEMORY_BYTES = 4 << 30


def test_it_ends_the_engine_with_the_reason_and_memory_that_ran_out_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the modes are those of one thread
    folder = tiny.build("mixtral", tmp_path / "model")
    cuda = FakeCuda(Gpu(MEMORY_BYTES))
    with installed(cuda), opened(folder, tmp_path / "cache", device="cuda") as loaded:
        engine = loaded.engine
        healthy = [each.ids for each in generate(engine, PROMPTS, GREEDY)]
        used_bytes, cuda.used_bytes = cuda.used_bytes, MEMORY_BYTES
        failed = generate(engine, PROMPTS, GREEDY)
        assert {each.error for each in failed} == {STEP_FAILED} and not engine.lost
        assert engine.scheduler.kv_reserved_bytes == 0
        cuda.used_bytes = used_bytes
        assert [each.ids for each in generate(engine, PROMPTS, GREEDY)] == healthy
        cuda.stick_in(600)  # calls: in a later step
        lost = None
        while lost is None:
            failed = generate(engine, PROMPTS, GREEDY)
            lost = engine.lost
        assert {each.error for each in failed} == {STEP_FAILED}
        assert isinstance(lost, DeviceLost)
        assert "cuda:0 failed: CUDA error: illegal address; start again" in str(lost)
