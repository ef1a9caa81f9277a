"""One turn of stock transformers in its own environment: prefill and decode; one JSON line.

    PEERS/stock/bin/python -P stock_turn.py '{"model": "DIR", "experts": "eager", "decode": 16}'

Imports nothing of moestro. Fields: model, experts (implementation), prefill, decode (tokens),
repeats; for disk offload also offload (a folder) and memory (bytes that weights may take).
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers


def load(task: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {}
    if task.get("offload"):
        settings = {
            "device_map": "auto",
            "max_memory": {"cpu": task["memory"]},
            "offload_folder": task["offload"],
        }
    return transformers.AutoModelForCausalLM.from_pretrained(
        task["model"],
        dtype=torch.bfloat16,
        experts_implementation=task.get("experts", "eager"),
        **settings,
    ).train(False)


def prefill(model: Any, ids: torch.Tensor) -> tuple[Any, float]:
    began = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    return out, time.perf_counter() - began


def decode(model: Any, steps: int, depth: int) -> float:
    draw = torch.Generator().manual_seed(7)
    vocab = model.config.vocab_size
    out, _ = prefill(model, torch.randint(2, vocab, (1, depth), generator=draw))
    began = time.perf_counter()
    for _ in range(steps):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


@torch.inference_mode()
def run(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = load(task)
    found: dict[str, Any] = {"load_s": time.perf_counter() - began}
    repeats = task.get("repeats", 1)
    if not task.get("offload"):
        decode(model, 1, 8)
    if task.get("prefill"):
        draw = torch.Generator().manual_seed(1000)
        ids = torch.randint(2, model.config.vocab_size, (1, task["prefill"]), generator=draw)
        seconds = [prefill(model, ids)[1] for _ in range(repeats)]
        found["prefill_tok_s"] = task["prefill"] / statistics.median(seconds)
    if task.get("decode"):
        seconds = [decode(model, task["decode"], 8) for _ in range(repeats)]
        found["decode_tok_s"] = task["decode"] / statistics.median(seconds)
    return found


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
