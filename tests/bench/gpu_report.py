"""What `make gpu-check` does: gpu-marked tests, the link, the engine behind it; one JSON report.

    scripts/gpu_check.sh [REPORT]

The engine runs a random OLMoE of 4 layers x 64 experts with 100, 50 and 25 % of the experts in
slots and all of them in the host tier. Ceilings: the same with all resident, and the missing bytes
over the link's rate as measured in this very run.
"""

import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch

import tiny
from engine_kit import MIB, generate, opened
from moestro.cache import CacheStats
from moestro.engine import SamplingParams
from moestro.engine.loader import Loaded

REPO = Path(__file__).resolve().parents[2]
NOTHING_RUN = 3
FORMATS = ("native", "int8", "nf4")
SHARES = (1.0, 0.5, 0.25)
DECODE_TOKENS, PROMPT_TOKENS = 32, 512
SIZES_BYTES = (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB)


def main(path: Path) -> int:
    if not torch.cuda.is_available():
        report.show(f"gpu-check: no CUDA device: nothing was run (torch {torch.__version__})")
        return NOTHING_RUN
    found: dict[str, Any] = {"machine": report.machine() | gpu(), "tests": run_tests()}
    found["link"] = link(torch.device("cuda", 0), torch.cuda.synchronize)
    with tempfile.TemporaryDirectory() as scratch:
        model = olmoe(Path(scratch) / "model", layers=4, experts=64, hidden=1024, inner=512)
        found["engine"] = engine(model, Path(scratch) / "cache", found["link"], device="cuda")
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    report.show(f"gpu-check: report written to {path.resolve()}")
    return 1 if found["tests"]["failed"] else 0


def gpu() -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "gpu_memory_bytes": facts.total_memory,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
    }


def run_tests() -> dict[str, Any]:
    """Names and first lines of what failed; nothing run counts as failed."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={results}"]
        status = subprocess.run(command, cwd=REPO, check=False).returncode
        cases = list(ET.parse(results).iter("testcase")) if results.is_file() else []
    broken = {
        f"{case.get('classname')}.{case.get('name')}": (problem.get("message") or "").split("\n")[0]
        for case in cases
        for problem in [*case.findall("failure"), *case.findall("error")]
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    ran = len(cases) - skipped
    return {
        "passed": ran - len(broken),
        "skipped": skipped,
        "failed": broken or ({} if ran and not status else {"pytest": f"exit status {status}"}),
    }


def link(place: torch.device, wait: Callable[[], None]) -> dict[str, Any]:
    """Bytes per second from the host, by size, out of pinned and pageable memory."""
    rates: dict[str, dict[str, float]] = {}
    for kind in ("pinned", "pageable"):
        rates[kind] = {}
        for size in SIZES_BYTES:
            pin = kind == "pinned" and place.type == "cuda"
            source = torch.ones(size, dtype=torch.uint8, pin_memory=pin)
            target = torch.empty(size, dtype=torch.uint8, device=place)

            def copy(source: torch.Tensor = source, target: torch.Tensor = target) -> None:
                target.copy_(source, non_blocking=True)
                wait()

            rates[kind][f"{size // MIB} MiB"] = size / report.seconds(copy, 9)
        shown = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates[kind].items())
        report.show(f"link, {kind}: {shown}")
    return {"bytes_per_s": rates}


def olmoe(folder: Path, layers: int, experts: int, hidden: int, inner: int) -> Path:
    """A random OLMoE in bf16."""
    import transformers as hf

    sizes: dict[str, Any] = {
        **tiny.WIDTHS,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 2 * PROMPT_TOKENS,
    }
    config = hf.OlmoeConfig(**sizes, num_experts=experts, num_experts_per_tok=min(8, experts))
    return tiny.save(config, folder, torch.bfloat16)


def engine(
    model: Path, cache_dir: Path, link_found: dict[str, Any], **settings: Any
) -> list[dict[str, Any]]:
    """A row for each format and share of slots."""
    link_rate = max(link_found["bytes_per_s"]["pinned"].values())
    rows: list[dict[str, Any]] = []
    for expert_format in FORMATS:
        whole: dict[str, Any] | None = None
        for share in SHARES:
            row = measure(model, cache_dir, expert_format, share, whole, link_rate, settings)
            whole = whole or row
            rows.append(row)
            report.show(
                f"{expert_format:>6}, {100 * share:3.0f} % in slots: decode"
                f" {row['decode_tokens_per_s']:.1f} tok/s ({row['decode_percent_of_bound']:.0f} %"
                f" of the bound), 8 at once {row['batch8_tokens_per_s']:.1f}, prompt"
                f" {row['prefill_tokens_per_s']:.0f}, hits {row['decode_hit_percent']:.0f} %,"
                f" stalls {row['decode_stall_s']:.2f} s of {row['decode_s']:.2f} s"
            )
    return rows


def measure(
    model: Path,
    cache_dir: Path,
    expert_format: str,
    share: float,
    whole: dict[str, Any] | None,
    link_bytes_per_s: float,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """`whole` is the row with all experts resident, which the bound is made from."""
    with opened(model, cache_dir, expert_format=expert_format, **settings) as loaded:
        blob, total = loaded.info.expert_bytes, loaded.cache.plan.total_experts
        slots = max(round(share * total), loaded.info.experts_per_token)
    budgets = {"device_memory_bytes": slots * blob}
    budgets["host_memory_bytes"] = (total + 64) * blob + 256 * MIB
    given = settings | budgets
    with opened(model, cache_dir, expert_format=expert_format, **given) as loaded:
        prompt = list(range(10, 10 + PROMPT_TOKENS // 8)) * 8
        run(loaded, [prompt], 1)  # every expert is in the host tier now
        run(loaded, [[5, 6, 7]], DECODE_TOKENS)
        before = loaded.cache.stats()
        decode_s = run(loaded, [[5, 6, 7]], DECODE_TOKENS)
        after = loaded.cache.stats()
        batch_s = run(loaded, [[5 + i, 6, 7] for i in range(8)], DECODE_TOKENS)
        prefill_s = run(loaded, [prompt], 1)
        host = loaded.cache.stats().host
        link = None if host is None else host.link
    moved = after.loaded_bytes - before.loaded_bytes
    bound_s = max(whole["decode_s"] if whole else decode_s, moved / link_bytes_per_s)
    return {
        "expert_format": expert_format,
        "share": share,
        "slots": loaded.cache.plan.slots,
        "expert_bytes": blob,
        "decode_s": decode_s,
        "decode_tokens_per_s": DECODE_TOKENS / decode_s,
        "decode_percent_of_bound": 100 * bound_s / decode_s,
        "decode_moved_bytes": moved,
        "decode_stall_s": after.decode_stall_s - before.decode_stall_s,
        "decode_hit_percent": 100 * hits(before, after),
        "batch8_tokens_per_s": 8 * DECODE_TOKENS / batch_s,
        "prefill_tokens_per_s": PROMPT_TOKENS / prefill_s,
        "prefill_stall_s": loaded.cache.stats().prefill_stall_s,
        "link": None if link is None else link.name,
        "link_copies": None if link is None else link.copies,
        "link_bytes_per_busy_s": link.copied_bytes / link.busy_s if link and link.busy_s else None,
    }


def hits(before: CacheStats, after: CacheStats) -> float:
    found = after.hits + after.prefetch_hits - before.hits - before.prefetch_hits
    return found / max(1, after.lookups - before.lookups)


def run(loaded: Loaded, prompts: list[list[int]], tokens: int) -> float:
    """Seconds for all of it, the prompts included."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    began = time.perf_counter()
    generate(loaded.engine, prompts, params)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
