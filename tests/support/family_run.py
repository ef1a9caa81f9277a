"""One model type through the whole path of the engine, against stock transformers.

What the engine refuses with ModelRefused is an outcome; every other error and every wrong number
is a failure. Logits are compared, not only tokens: some tiny models repeat one token.
"""

import re
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from engine_kit import generate, opened, run_logits
from moestro.engine import EngineConfig, ModelRefused, SamplingParams
from moestro.engine.loader import Loaded
from moestro.engine.planning import Blueprint, Sketch, plan_memory, understand
from moestro.engine.weights import Checkpoint
from tiny_families import build, oracle

TOLERANCE = 1e-4
CLEAR_MARGIN = 1e-3  # of the best logit over the next: below it two right engines may differ
NEW_TOKENS = 16
REASON_CHARACTERS = 160


@dataclass(frozen=True)
class Compared:
    """What came of a comparison that held."""

    lane: str
    difference: float  # the largest one of a logit


@dataclass(frozen=True)
class Outcome:
    """What the engine does with a model type."""

    result: str  # passed, refused
    lane: str = ""  # how it runs, where the engine says so
    reason: str = ""  # of a refusal


def outcome_of(kind: str, folder: Path) -> Outcome:
    """Build the tiny model of type `kind` below `folder` and hold the engine to stock's logits."""
    model = build(kind, folder / kind)
    equal_plans(model, folder)
    stock = oracle(kind, model)
    try:
        compared = compare(stock, model, folder / "cache")
    except ModelRefused as refusal:
        return Outcome("refused", reason=_plain(str(refusal), folder))
    return Outcome("passed", compared.lane)


def equal_plans(model: Path, folder: Path, **settings: Any) -> Blueprint | None:
    """The config alone tells what the files tell: parts, experts, lane, or the same refusal.

    Returns what the files tell; None where they are refused.
    """
    bare = folder / "bare"
    bare.mkdir(exist_ok=True)
    shutil.copy(model / "config.json", bare)
    found, blueprints = [], list[Blueprint]()
    for path, kind in ((model, Checkpoint), (bare, Sketch)):
        config = EngineConfig(path, folder, **settings)
        try:
            blueprint = understand(config, kind(path))
        except ModelRefused as refusal:
            found.append(str(refusal).replace(str(path), ""))
            continue
        blueprints.append(blueprint)
        parts = plan_memory(config, blueprint).parts()
        layers = [(layer.num_experts, layer.layout) for layer in blueprint.spec.layers]
        found.append(str(({**parts, "interpreter": 0}, layers, blueprint.topology)))
    assert found[0] == found[1]
    return blueprints[0] if blueprints else None


def compare(stock: Any, model: Path, cache: Path, **settings: Any) -> Compared:
    """Raises AssertionError where the engine, started with `settings`, differs from `stock`."""
    prompt, wanted_ids, wanted = greedy(stock)
    forced = [[(1, prompt)], *([(1, [token])] for token in wanted_ids[:-1])]
    with opened(model, cache, **settings) as loaded:
        plan = loaded.cache.plan
        assert plan.holds_all
        whole = _equal(run_logits(loaded, forced), wanted, "decoded tokens, all experts resident")
    half = plan.total_experts // 2 * plan.slot_bytes
    with opened(model, cache, host_memory_bytes=half, **settings) as loaded:
        assert not loaded.cache.plan.holds_all
        packed = _equal(*_packed(loaded, stock), "packed, in chunks and alone")
        alone = _equal(run_logits(loaded, forced), wanted, "decoded tokens, half of the experts")
        assert loaded.cache.stats().misses > 0
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        found = generate(loaded.engine, [prompt, prompt[:5]], params)[0].ids
        sure = _sure_tokens(wanted)
        assert found[:sure] == wanted_ids[:sure], f"greedy: {found} instead of {wanted_ids}"
        return Compared(str(getattr(loaded.info, "lane", "")), max(whole, packed, alone))


def greedy(stock: Any) -> tuple[list[int], list[int], torch.Tensor]:
    """A prompt of 9, the NEW_TOKENS that stock chooses and the logits [NEW_TOKENS, vocabulary]."""
    prompt = torch.randint(200, (9,), generator=torch.Generator().manual_seed(2)).tolist()
    ids, rows, cache, start = prompt, [], None, 0
    chosen: list[int] = []
    with torch.inference_mode():
        while len(chosen) < NEW_TOKENS:
            output = stock(
                input_ids=torch.tensor([ids]),
                position_ids=torch.arange(start, start + len(ids))[None],
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = output.past_key_values, start + len(ids)
            rows.append(output.logits[0, -1])
            ids = [int(rows[-1].argmax())]
            chosen += ids
    return prompt, chosen, torch.stack(rows)


def _packed(loaded: Loaded, stock: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits found and wanted, for steps that mix prompts, chunks and single tokens."""
    ids = torch.randint(200, (2, 15), generator=torch.Generator().manual_seed(1)).tolist()
    first, second = ids[0], ids[1][:9]
    alone = 12  # of the first prompt, in chunks; where its class takes none, at once
    chunk = alone if loaded.engine.scheduler.limits.whole_prompts else 8
    steps = [
        [(1, first[:chunk]), (2, second[:7])],  # two prompts in one row
        [(1, first[chunk:alone]), (2, second[7:8])],  # a chunk that goes on, beside a single token
        *[[(1, [token])] for token in first[alone:]],  # alone, one by one
        [(2, second[8:])],
    ]
    steps = [[part for part in step if part[1]] for step in steps]
    with torch.inference_mode():
        of_first, of_second = (
            stock(
                input_ids=torch.tensor([tokens]),
                position_ids=torch.arange(len(tokens))[None],
                use_cache=False,
            ).logits[0]
            for tokens in (first, second)
        )
    logits, done, wanted = {1: of_first, 2: of_second}, {1: 0, 2: 0}, []
    for number, tokens in chain(*steps):
        done[number] += len(tokens)
        wanted.append(logits[number][done[number] - 1])
    return run_logits(loaded, steps), torch.stack(wanted)


def _equal(found: torch.Tensor, wanted: torch.Tensor, what: str) -> float:
    """The largest difference."""
    errors = (found - wanted).abs().amax(-1)
    wrong = [f"{error:.1e}" for error in errors.tolist()]
    assert bool((errors < TOLERANCE).all()), f"{what}: largest errors of the steps are {wrong}"
    return float(errors.max())


def _sure_tokens(logits: torch.Tensor) -> int:
    """How many tokens from the start are chosen by a clear margin."""
    best = logits.topk(2).values
    clear = (best[:, 0] - best[:, 1] > CLEAR_MARGIN).tolist()
    return clear.index(False) if False in clear else len(clear)


def _plain(message: str, folder: Path) -> str:
    """A refusal in one line that no machine's paths change and no table is broken by."""
    message = re.sub(rf"{re.escape(str(folder))}\S*?(?=[:\s]|$)", "model", message)
    message = re.sub(r"\s+", " ", message).replace("|", "/")
    return message if len(message) <= REASON_CHARACTERS else message[:REASON_CHARACTERS] + "…"
