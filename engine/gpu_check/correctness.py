"""A small random model on the device against the same one computed elsewhere.

Native weights are held against stock transformers in fp32, others against this engine on the CPU:
the rounding of a format is no fault of a device. And whatever the cache holds, the tokens are the
same, exactly.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from moestro.engine.facts import GIB, MIB, EngineConfig

from .bench import Bench
from .found import CannotRun, Found
from .geometry import Geometry
from .random_model import write_model
from .stream import forced, greedy

# Few near ties of the router, which rounding would turn: its weights are large.
SMALL = Geometry("small", "qwen3_moe", 256, 128, 8, 2, 4, 2, 64, 2, std=0.1, router_std=1.0)
PROMPT = tuple(range(40, 64))
ANSWER = tuple(range(90, 98))
GREEDY_TOKENS = 24
# Of the largest logit, in the median row: a turned choice of a router spoils a row or two.
NATIVE_TOLERANCE, COARSE_TOLERANCE = 1e-3, 0.1


def correctness(bench: Bench, found: Found, expert_format: str) -> None:
    if expert_format == "nf4" and find_spec("bitsandbytes") is None:
        raise CannotRun("bitsandbytes is not installed (pip install 'moestro[nf4]')")
    model = bench.scratch / "small"
    if not (model / "config.json").exists():
        write_model(SMALL, model)
    exact = bench.imagined and expert_format == "native"
    most = NATIVE_TOLERANCE if exact else COARSE_TOLERANCE
    wanted = _reference(bench, model, expert_format)
    answers = []
    room_bytes = 256 * MIB  # for all and more
    for name in ("all", "half"):
        with bench.opened(bench.config(model, expert_format, room_bytes, GIB)) as opened:
            room_bytes = SMALL.layers * SMALL.experts // 2 * opened.info.expert_bytes
            logits = forced(opened, PROMPT, ANSWER)
            answers.append(greedy(opened, PROMPT, GREEDY_TOKENS))
            held = opened.cache.plan.slots
        row = _compare(logits, wanted) | {"slots": held, "tokens": answers[-1]}
        found.facts[f"{name}_resident"] = row
        found.lines.append(
            f"{name} resident ({held} slots): logits differ by {row['median']:.1e} of the largest,"
            f" at worst {row['worst']:.1e}"
        )
        if not row["median"] <= most:  # NaN is not
            found.problems.append(f"{name} resident: logits differ by {row['median']:.1e}")
    found.facts["tolerance"] = most
    if answers[0] == answers[1]:
        found.lines.append(f"the same {GREEDY_TOKENS} tokens whatever the cache holds")
    else:
        found.problems.append("other tokens with half of the experts resident than with all")


def _reference(bench: Bench, model: Path, expert_format: str) -> torch.Tensor:
    """Logits [1 + len(ANSWER), V] in fp32, from the CPU."""
    if expert_format == "native":
        return _stock(model)
    config = EngineConfig(
        model,
        bench.scratch / "cache",
        expert_format=expert_format,
        host_memory_bytes=GIB,
        kv_memory_bytes=64 * MIB,
        max_model_len_tokens=512,
        prefetch=False,
    )
    with bench.opened(config) as opened:
        return forced(opened, PROMPT, ANSWER)


def _stock(model: Path) -> torch.Tensor:
    stock = hf.AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=False,
    ).train(False)
    ids = torch.tensor([[*PROMPT, *ANSWER]])
    with torch.inference_mode():
        logits: torch.Tensor = stock(ids).logits[0, len(PROMPT) - 1 :].float()
    return logits


def _compare(found: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Largest difference of each row over the largest logit of that row."""
    apart = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1)
    return {"median": float(apart.median()), "worst": float(apart.max())}
