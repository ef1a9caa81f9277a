"""Every family through the whole path equals stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import KIB, opened, run_logits
from family_run import outcome_of

TOLERANCE = 1e-4


# Each is built unlike the others; `make families` holds all that transformers has.
DIFFERENT = {
    "aria_text": "transposed matrices",
    "beam": "routed by groups, per-kind rotations",
    "cohere2_moe": "attention and experts in parallel",
    "deepseek_v3": "latent attention, a dense layer",
    "flint": "sinks and dense layers among windows",
    "gemma4_text": "widths that differ by layer, a dense layer beside the experts",
    "glm4_moe_lite": "latent attention, rotated in part",
    "gpt_oss": "interleaved matrices with biases, sinks",
    "granitemoeshared": "multipliers, a shared expert",
    "hunyuan_v1_moe": "norms after the rotation",
    "laguna": "as many heads as the layer says",
    "mimo_v2_flash": "values narrower than keys, sinks",
    "mixtral": "a window in every layer",
    "phimoe": "a router that masks as it picks",
    "qwen3_moe": "norms of heads",
}


# What is odd in them the others have, too, each with something else.
REPEATED = {"flint", "glm4_moe_lite", "hunyuan_v1_moe"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind in REPEATED else kind
        for kind in DIFFERENT
    ],
)
def test_the_whole_path_equals_stock(kind: str, tmp_path: Path) -> None:
    assert outcome_of(kind, tmp_path).result == "passed"


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
