"""One turn of stock transformers in its own environment: prefill and decode; one JSON line.

    PEERS/stock/bin/python -P stock_turn.py '{"model": "DIR", "experts": "eager", "decode": 16}'

Imports nothing of moestro. Fields: model, dtype, experts (implementation; none for a dense
model), prefill, decode (tokens), repeats, prompt (ids to decode after); for disk offload also
offload (a folder) and memory (bytes that weights may take).
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
    if task.get("experts"):
        settings["experts_implementation"] = task["experts"]
    return transformers.AutoModelForCausalLM.from_pretrained(
        task["model"], dtype=getattr(torch, task.get("dtype", "bfloat16")), **settings
    ).train(False)


def prefill(model: Any, ids: torch.Tensor) -> tuple[Any, float]:
    began = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    return out, time.perf_counter() - began


def decode(model: Any, steps: int, prompt: list[int]) -> float:
    out, _ = prefill(model, torch.tensor([prompt]))
    began = time.perf_counter()
    for _ in range(steps):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


def random_prompt(model: Any, tokens: int) -> list[int]:
    draw = torch.Generator().manual_seed(7)
    found: list[int] = torch.randint(2, model.config.vocab_size, (tokens,), generator=draw).tolist()
    return found


@torch.inference_mode()
def run(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = load(task)
    found: dict[str, Any] = {"load_s": time.perf_counter() - began}
    repeats = task.get("repeats", 1)
    prompt = task.get("prompt") or random_prompt(model, 8)
    if not task.get("offload"):
        decode(model, 1, prompt)
    if task.get("prefill"):
        draw = torch.Generator().manual_seed(1000)
        ids = torch.randint(2, model.config.vocab_size, (1, task["prefill"]), generator=draw)
        seconds = [prefill(model, ids)[1] for _ in range(repeats)]
        found["prefill_tok_s"] = task["prefill"] / statistics.median(seconds)
    if task.get("decode"):
        seconds = [decode(model, task["decode"], prompt) for _ in range(repeats)]
        found["decode_tok_s"] = task["decode"] / statistics.median(seconds)
    return found


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
