"""The demo model through the engine: decode, batch and prompt, by format and budget.

    make bench ARGS=bench_engine

The ceiling of decode is what must be read from memory for one token over one thread's bandwidth,
plus, where experts are missing, the bytes of the missing ones over the disk's speed as it was
in that very run; of a prompt, its multiply-adds over the kernels' own rate.
"""

import os
import time
from pathlib import Path
from typing import Any

import report
import torch

from engine_kit import MIB, generate, opened
from moestro.engine import SamplingParams
from moestro.engine.loader import Loaded
from moestro.factorize import prepare_demo

PROMPTS = ["Gravity is", "Once upon a time", "Water boils when", "def fibonacci(n):"] * 2
DECODE_TOKENS = 24
PROMPT_TOKENS = 512
FORMATS = [("native", "native"), ("int8", "int8")]
BUDGETS = {"all": 1.0, "half": 0.5, "fifth": 0.2}


def main() -> None:
    torch.set_num_threads(1)
    cache_dir = Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))
    demo = prepare_demo(cache_dir, lambda _: None)
    bandwidth = report.memory_bandwidth()
    report.show(f"machine: {report.machine()}")
    report.show(f"one thread reads {bandwidth / 1e9:.1f} GB/s from memory")
    results = []
    for experts, dense in FORMATS:
        rate = report.kernel_rate("int8" if dense == "int8" else "fp32", 128)
        for budget, share in BUDGETS.items():
            blob = 110_592 if experts == "native" else 61_440
            settings = {"expert_format": experts, "dense_format": dense}
            slots = max(12, int(720 * share))
            with opened(
                demo,
                cache_dir,
                host_memory_bytes=slots * blob,
                kv_memory_bytes=128 * MIB,
                **settings,
            ) as loaded:
                row = measure(loaded, bandwidth, rate)
            row |= {"experts": experts, "dense": dense, "budget": budget, "slots": slots}
            results.append(row)
            report.show(
                f"{experts}/{dense} {budget:>5}: decode {row['decode']:5.1f} tok/s"
                f" ({row['decode_percent']:.0f} % of {row['decode_ceiling']:.0f}),"
                f" 8 at once {row['batch8']:5.1f}, prompt {row['prompt']:5.0f} tok/s"
                f" ({row['prompt_percent']:.0f} % of {row['prompt_ceiling']:.0f}),"
                f" hits {row['hit_percent']:.0f} %"
            )
    report.finish("engine", {"bandwidth": bandwidth, "rows": results})


def measure(loaded: Loaded, bandwidth: float, rate: float) -> dict[str, Any]:
    engine = loaded.engine
    ids = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    params = SamplingParams(max_tokens=DECODE_TOKENS, temperature=0.0, ignore_eos=True)
    generate(engine, ids[:1], params)
    before = loaded.cache.stats()
    alone_s = report.seconds(lambda: generate(engine, ids[:1], params), 3)
    after = loaded.cache.stats()
    batch_s = report.seconds(lambda: generate(engine, ids, params), 3)
    prompt = [engine.tokenizer.encode("The quick brown fox jumps. " * 200)[:PROMPT_TOKENS]]
    one = SamplingParams(max_tokens=1, temperature=0.0)
    prompt_s = report.seconds(lambda: generate(engine, prompt, one), 3)
    lookups = after.lookups - before.lookups
    hits = after.hits + after.prefetch_hits - before.hits - before.prefetch_hits
    loads = after.loads - before.loads
    read_s = after.demand_read_s + after.prefetch_read_s - before.demand_read_s
    read_s -= before.prefetch_read_s
    per_token_s = _resident_bytes(loaded) / bandwidth
    link_s = read_s / (4 * DECODE_TOKENS) if loads else 0.0
    decode, ceiling = DECODE_TOKENS / alone_s, 1 / max(per_token_s, link_s)
    prompt_rate, prompt_ceiling = PROMPT_TOKENS / prompt_s, rate / _active_weights(loaded)
    return {
        "decode": decode,
        "decode_ceiling": ceiling,
        "decode_percent": 100 * decode / ceiling,
        "batch8": 8 * DECODE_TOKENS / batch_s,
        "prompt": prompt_rate,
        "prompt_ceiling": prompt_ceiling,
        "prompt_percent": 100 * prompt_rate / prompt_ceiling,
        "hit_percent": 100 * hits / lookups,
        "loads_per_token": loads / (4 * DECODE_TOKENS),
        "measured_at_s": time.time(),
    }


def _active_weights(loaded: Loaded) -> int:
    """Weights that one token is multiplied with: 115 M of the demo's 135 M, the head included."""
    info, shape = loaded.info, 3 * 32 * 576
    experts = info.moe_layers * info.experts_per_token * shape
    attention = info.num_layers * (2 * 576 * 576 + 2 * 576 * 192)
    return experts + attention + info.num_layers * 3 * 768 * 576 + 49_152 * 576


def _resident_bytes(loaded: Loaded) -> int:
    """Bytes read for one token: every weight once, the experts as the slots hold them."""
    info = loaded.info
    experts = info.moe_layers * info.experts_per_token * info.expert_bytes
    dense = _active_weights(loaded) - info.moe_layers * info.experts_per_token * 3 * 32 * 576
    return experts + dense * (1 if info.expert_format == "int8" else 4)


if __name__ == "__main__":
    main()
