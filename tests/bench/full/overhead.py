"""One turn of P5: what a layer costs at widths where arithmetic is nothing; one JSON line.

    python -m full.overhead MODEL_DIR CACHE_DIR SIDE      (SIDE: ours-native, ours-int8, stock)

Clocks sit around the MoE block (router, experts, combine) and around the whole decoder layer of
stock transformers' modules, for moestro runs those very modules.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

from engine_kit import MIB, opened
from moestro.engine import SamplingParams
from moestro.engine.model.thin_layer import ThinLayer

from .ours import generate, random_ids

WARM_STEPS, STEPS = 40, 200
Times = dict[str, list[float]]


def clock(model: Any) -> Times:
    """Seconds of every call of each layer and of its MoE block, from now on."""
    times: Times = defaultdict(list)
    for layer in model.model.layers:
        _wrap(layer, "layer", times)
        _wrap(layer.mlp, "block", times)
    return times


def _wrap(module: Any, name: str, times: Times) -> None:
    inner, into = module.forward, times[name]

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        out = inner(*args, **kwargs)
        into.append(time.perf_counter() - began)
        return out

    module.forward = timed


def ours(folder: Path, cache: Path, experts: str) -> dict[str, float]:
    with opened(folder, cache, expert_format=experts, kv_memory_bytes=64 * MIB) as loaded:
        params = SamplingParams(WARM_STEPS, temperature=0.0, ignore_eos=True)
        for seed in range(4):
            generate(loaded, [random_ids(loaded, 64, seed)], params)
        model = loaded.engine.runner.lane.model
        whole = [each.__dict__.get("forward") for each in model.model.layers]
        times = clock(model)
        began = loaded.cache.stats()
        params = SamplingParams(STEPS, temperature=0.0, ignore_eos=True)
        turn = generate(loaded, [random_ids(loaded, 8, 5)], params)
        steps_s, layers_s = turn.steps_s, list(times["layer"])
        if len(times["block"]) < STEPS:  # whole layers went past it: once more, module by module
            times["block"].clear()
            for layer in whole:
                assert isinstance(layer, ThinLayer)
                layer.trusted = False
            generate(loaded, [random_ids(loaded, 8, 5)], params)
            times["layer"][:] = layers_s
        if loaded.cache.stats().misses - began.misses > STEPS // 4:
            raise RuntimeError("experts were read while the fixed cost was measured")
    return _summary(times, statistics.median(steps_s))


@torch.inference_mode()
def stock(folder: Path) -> dict[str, float]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).train(False)
    times = clock(model)
    out = model(torch.arange(2, 10)[None], use_cache=True)
    steps: list[float] = []
    for step in range(WARM_STEPS + STEPS):
        if step == WARM_STEPS:
            for each in times.values():
                each.clear()
        began = time.perf_counter()
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(time.perf_counter() - began)
    return _summary(times, statistics.median(steps[WARM_STEPS:]))


def _summary(times: Times, step_s: float) -> dict[str, float]:
    """Medians in seconds. A block that was never called is not in it: something replaced it."""
    found = {name: statistics.median(each) for name, each in times.items() if each}
    return {**found, "step": step_s}


def main() -> None:
    torch.set_num_threads(1)
    folder, cache, side = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    found = stock(folder) if side == "stock" else ours(folder, cache, side.removeprefix("ours-"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
