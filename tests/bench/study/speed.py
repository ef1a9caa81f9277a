"""How fast the engine decodes a plan's model: greedy tokens of one request, all in memory."""

import statistics
import time
from pathlib import Path

from engine_kit import MIB, generate, opened
from moestro.engine import SamplingParams
from moestro.factorize import Plan, apply_plan

from .cells import Values

PROMPT = "The old harbour town had three streets, a church and a market where"
DECODE_TOKENS = 48
RUNS = 5


def measure_speed(plan: Plan, dense: Path, scratch: Path, active: int | None) -> Values:
    """Median over runs of tokens per second, prompt included; `active` None: the plan's own.

    Native weights (bfloat16 where they are such), one thread.
    """
    model = scratch / "model"
    apply_plan(plan, dense, model, lambda _: None)
    params = SamplingParams(max_tokens=DECODE_TOKENS, temperature=0.0, ignore_eos=True)
    settings = {"experts_per_token": active, "host_memory_bytes": 1024 * MIB}
    speeds = []
    with opened(model, scratch / "cache", kv_memory_bytes=32 * MIB, **settings) as loaded:
        ids = loaded.tokenizer.encode(PROMPT)
        generate(loaded.engine, [ids], params)
        for _ in range(RUNS):
            began_s = time.perf_counter()
            generate(loaded.engine, [ids], params)
            speeds.append(DECODE_TOKENS / (time.perf_counter() - began_s))
    return {"tokens_per_s": round(statistics.median(speeds), 2), "runs": RUNS}
