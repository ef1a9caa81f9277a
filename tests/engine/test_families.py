"""Every family through the whole path equals stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import KIB, generate, opened, run_logits
from moestro.engine import SamplingParams

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_packed_chunked_and_single_tokens_equal_stock(family: str, tmp_path: Path) -> None:
    folder = tiny.build(family, tmp_path / family)
    ids = torch.randint(200, (2, 14), generator=torch.Generator().manual_seed(1)).tolist()
    first, second = ids[0], ids[1][:7]
    with torch.inference_mode():
        stock = tiny.oracle(folder)
        wanted_first = stock(torch.tensor([first])).logits[0]
        wanted_second = stock(torch.tensor([second])).logits[0]
    steps = [
        [(1, first[:8]), (2, second[:5])],  # two prompts in one row
        [(1, first[8:11]), (2, second[5:6])],  # a chunk that goes on, beside a single token
        *[[(1, [token])] for token in first[11:]],  # alone, one by one
        [(2, second[6:])],
    ]
    wanted = torch.stack(
        [wanted_first[7], wanted_second[4], wanted_first[10], wanted_second[5]]
        + [wanted_first[i] for i in (11, 12, 13)]
        + [wanted_second[6]]
    )
    with opened(folder, tmp_path / "cache", host_memory_bytes=_half(folder)) as loaded:
        assert not loaded.cache.plan.holds_all
        found = run_logits(loaded, steps)
        assert loaded.cache.stats().misses > 0
    assert (found - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_greedy_tokens_equal_stock(family: str, tmp_path: Path) -> None:
    folder = tiny.build(family, tmp_path / family)
    prompts = torch.randint(200, (3, 9), generator=torch.Generator().manual_seed(2)).tolist()
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    with opened(folder, tmp_path / "cache", host_memory_bytes=_half(folder)) as loaded:
        found = [generation.ids for generation in generate(loaded.engine, prompts, params)]
    stock = tiny.oracle(folder)
    for prompt, ids in zip(prompts, found, strict=True):
        wanted = stock.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
        )
        assert ids == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_compute_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.build("qwen3_moe", tmp_path / "model", dtype)
    prompt = list(range(20, 30))
    with torch.inference_mode():
        wanted = tiny.oracle(folder)(torch.tensor([prompt])).logits[0, -1]
    with opened(folder, tmp_path / "cache") as loaded:
        assert loaded.cache.plan.holds_all
        assert loaded.info.expert_bytes == 12 * KIB  # 3 x 32 x 64 numbers of 2 bytes
        found = run_logits(loaded, [[(1, prompt)]])[0]
    assert (found - wanted).abs().max() < TOLERANCE


def _half(folder: Path) -> int:
    """A budget for about half of the experts of a tiny model."""
    widest = 4 * 3 * (32 if "qwen3" in folder.name or "deepseek" in folder.name else 64) * 64
    return 14 * (widest + 4 * KIB)


def test_sinks_in_blocks_equal_sinks_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moestro.engine.model import attention

    folder = tiny.build("gpt_oss", tmp_path / "model")
    prompt = list(range(40))
    with opened(folder, tmp_path / "cache") as loaded:
        whole = run_logits(loaded, [[(1, prompt)]])
        monkeypatch.setattr(attention, "SINK_BLOCK_BYTES", 4 * 4 * 40 * 7)
        assert (run_logits(loaded, [[(1, prompt)]]) - whole).abs().max() < 1e-5


def test_longrope_is_carried_up_to_its_original_length(tmp_path: Path) -> None:
    import transformers as hf

    factors = {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    rope |= {"original_max_position_embeddings": 64, "factor": 8.0}
    widths: dict[str, Any] = {**tiny.WIDTHS, "head_dim": 16, "rope_parameters": rope}
    config = hf.MixtralConfig(**widths, num_local_experts=8, num_experts_per_tok=2)
    folder = tiny.save(config, tmp_path / "model")
    with opened(folder, tmp_path / "cache") as loaded:
        assert loaded.info.max_model_len_tokens == 64
