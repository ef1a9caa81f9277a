"""One turn of fastllm in its own environment: experts on disk behind its RAM cache; one JSON line.

    PEERS/fastllm/bin/python -P fastllm_turn.py '{"model": "DIR", "cache": 600000000, …}'

Imports nothing of moestro. Fields: model, cache (bytes of RAM for experts), prefill, decode
(tokens), dtype, moe_dtype.
"""

import json
import random
import sys
import time
from typing import Any

from ftllm import llm  # type: ignore[import-not-found]

VOCAB = 50304


def load(task: dict[str, Any]) -> Any:
    llm.set_cpu_threads(1)
    llm.set_device_map("cpu")
    llm.set_device_map("disk", True)
    llm.set_moe_cpu_cache(task["cache"])
    return llm.model(
        task["model"],
        dtype=task.get("dtype", "float16"),
        moe_dtype=task.get("moe_dtype", ""),
        tokenizer_type="auto",
    )


def run(task: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    model = load(task)
    found: dict[str, Any] = {"load_s": time.perf_counter() - began}
    draw = random.Random(7)
    prompt = [draw.randrange(2, task.get("vocab", VOCAB)) for _ in range(task["prefill"])]
    times = [time.perf_counter()]
    before = llm.get_disk_moe_cache_stats()
    steps = task["decode"] + 1
    for _ in model.stream_response_raw(prompt, max_length=steps, do_sample=False):
        if len(times) == 1:
            before = llm.get_disk_moe_cache_stats()
        times.append(time.perf_counter())
    after = llm.get_disk_moe_cache_stats()
    if len(times) != steps + 1:
        raise RuntimeError(f"{len(times) - 1} tokens came instead of {steps}")
    found["prefill_tok_s"] = task["prefill"] / (times[1] - times[0])
    found["decode_tok_s"] = task["decode"] / (times[-1] - times[1])
    found["decode_disk_bytes"] = after["disk_bytes"] - before["disk_bytes"]
    found["decode_misses"] = after["misses"] - before["misses"]
    found["decode_hits"] = after["cpu_hits"] - before["cpu_hits"]
    found["resident_bytes"] = after["cpu_bytes"]
    return found


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
