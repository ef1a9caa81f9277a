"""The demo model through the whole path: exact whatever the cache, inside its budget, counted."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers as hf

from engine_kit import MIB, generate, opened, run_logits
from exposition import samples
from moestro.engine import SamplingParams
from moestro.factorize import apply_plan, demo_plan, prepare_demo, prepare_dense
from server_process import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

PROMPTS = [
    "Gravity is",
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils when",
]
BLOB = 110_592
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def cache_dir() -> Path:
    return Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))


@pytest.fixture(scope="module")
def demo(cache_dir: Path) -> Path:
    return prepare_demo(cache_dir, lambda _: None)


@pytest.fixture(scope="module")
def wanted(demo: Path, cache_dir: Path) -> list[list[int]]:
    """Each prompt alone, all experts resident."""
    with opened(demo, cache_dir, kv_memory_bytes=64 * MIB) as loaded:
        assert loaded.cache.plan.holds_all
        ids = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
        return [generate(loaded.engine, [prompt], GREEDY)[0].ids for prompt in ids]


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("slots", [720, 360, 180, 24])
def test_greedy_text_is_the_same_for_every_budget(
    slots: int, prefetch: bool, demo: Path, cache_dir: Path, wanted: list[list[int]]
) -> None:
    settings: Any = {"host_memory_bytes": slots * BLOB, "prefetch": prefetch}
    with opened(demo, cache_dir, kv_memory_bytes=64 * MIB, **settings) as loaded:
        assert loaded.cache.plan.slots == slots
        ids = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
        alone = [generate(loaded.engine, [prompt], GREEDY)[0].ids for prompt in ids]
        together = [one.ids for one in generate(loaded.engine, ids[:4], GREEDY)]
        loaded.cache.check()
    assert alone == wanted
    assert together == wanted[:4]


def test_all_experts_give_the_dense_model(cache_dir: Path, tmp_path: Path) -> None:
    """Of the demo's plan as it is applied without the deltas of its recovery."""
    source, exact = prepare_dense(cache_dir, lambda _: None), tmp_path / "exact"
    apply_plan(demo_plan(), source, exact, lambda _: None)
    dense = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with opened(exact, tmp_path, kv_memory_bytes=64 * MIB, experts_per_token=24) as loaded:
        assert loaded.info.experts_per_token == 24
        for prompt in PROMPTS:
            ids = loaded.tokenizer.encode(prompt)
            with torch.inference_mode():
                reference = dense(torch.tensor([ids])).logits[0, -1]
                text = dense.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    max_new_tokens=64,
                    min_new_tokens=64,
                    do_sample=False,
                    eos_token_id=None,
                )[0, len(ids) :].tolist()
            found = run_logits(loaded, [[(1, ids)]])[0]
            assert (found - reference).abs().max() < 1e-4
            assert generate(loaded.engine, [ids], GREEDY)[0].ids == text


def test_int8_starts_checks_itself_and_speaks(demo: Path, tmp_path: Path) -> None:
    formats = {"expert_format": "int8", "dense_format": "int8"}
    with opened(demo, tmp_path, kv_memory_bytes=64 * MIB, **formats) as loaded:
        prompt = loaded.tokenizer.encode("The capital of France is")
        assert "Paris" in generate(loaded.engine, [prompt], GREEDY)[0].text


@pytest.fixture(scope="module")
def url(demo: Path, cache_dir: Path) -> Iterator[str]:
    flags = ("--host-memory", "16MiB", "--kv-memory", "64MiB", "--threads", "1")
    with serving("demo", *flags, "--cache-dir", str(cache_dir)) as server:
        yield server.url


def test_the_official_client_reads_sensible_text(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        fields: Any = {"model": "demo", "prompt": "Gravity is", "max_tokens": 32, "temperature": 0}
        plain = client.completions.create(**fields)
        stream = list(client.completions.create(**fields, stream=True))
        assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text
        assert "force" in plain.choices[0].text or "concept" in plain.choices[0].text
        assert plain.usage is not None
        assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (3, 32)

        def ended(prompt: str) -> str | None:
            last = None
            for chunk in client.completions.create(**{**fields, "prompt": prompt}, stream=True):
                last = chunk.choices[0].finish_reason
            return last

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(ended, PROMPTS[:4])) <= {"length", "stop"}


@pytest.mark.parametrize("flags", [(), ("--no-prefetch",)])
def test_the_books_balance_after_20_requests(
    flags: tuple[str, ...], demo: Path, cache_dir: Path
) -> None:
    budget = ("--host-memory", "40MiB", "--kv-memory", "64MiB", "--threads", "1")
    with serving("demo", *budget, *flags, "--cache-dir", str(cache_dir)) as server:
        for number in range(20):
            answer = server.complete(PROMPTS[number % 5], max_tokens=1 + number % 4)
            assert answer.status_code == 200
        found = samples(server.metrics())
    results = {"hit": 0.0, "prefetch_hit": 0.0, "miss": 0.0}
    loads = moved = 0.0
    for (name, labels), value in found.items():
        if name == "moestro_expert_lookups_total":
            results[dict(labels)["result"]] += value
        elif name == "moestro_expert_loads_total":
            loads += value
        elif name == "moestro_expert_transfer_bytes_total":
            moved += value
    generated = found["moestro_generation_tokens_total", ()]
    assert generated == sum(1 + number % 4 for number in range(20))
    # a decode step asks for each layer's number, a prompt of a few tokens for at least that
    assert sum(results.values()) >= generated * sum(demo_plan().layer_counts)
    assert moved == loads * BLOB
    if flags:
        assert loads == results["miss"] and results["prefetch_hit"] == 0
    else:
        assert results["prefetch_hit"] > 0


@pytest.mark.parametrize("budget", ["16MiB", "80MiB"])
def test_memory_seen_from_outside_stays_inside_the_plan(
    budget: str, demo: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Fresh cache folder: the peak holds packing, loading, prefill of a long prompt and decode."""
    flags = ("--host-memory", budget, "--kv-memory", "64MiB", "--threads", "1")
    with serving(demo, *flags, "--cache-dir", str(tmp_path)) as server:
        text = "The quick brown fox jumps over the lazy dog. " * 60
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda n: server.complete(text[n:], max_tokens=8), range(4)))
        assert {answer.status_code for answer in answers} == {200}
        found = samples(server.metrics())
        planned = sum(
            value for (name, _), value in found.items() if name == "moestro_memory_planned_bytes"
        )
        high_water = _high_water_bytes(server.process.pid)
    assert planned > 0
    assert max(high_water, server.peak_rss_bytes) <= planned * 1.05


def _high_water_bytes(pid: int) -> int:
    """The kernel's own record of the largest resident size."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
