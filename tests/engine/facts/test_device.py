"""A device with memory of its own gives stock's logits: one imagined on the CPU, and GPUs.

All of it runs twice: `imagined` takes every path but the GPU's kernels; where a GPU is, the tests
marked `gpu` run the same on it.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tiny
from engine_kit import MIB, generate, opened, run_logits
from imagined import imagined, nothing
from moestro.engine import BudgetTooSmall, EngineConfig, SamplingParams, StartError
from moestro.engine.facts.device import Device, HostCopy, choose, index_on
from moestro.engine.formats.matrices import filled_int_mm, filled_int_mm_apart
from moestro.engine.model.attention import for_every_head
from moestro.engine.model.experts import mark, places_by_expert, sort_by_expert
from moestro.engine.step.sequence import Sequence as Running

STEPS: list[list[tuple[int, list[int]]]] = [
    [(1, list(range(10, 40))), (2, list(range(60, 65)))],
    [(1, [7]), (2, [9])],
    [(1, [8]), (2, [9]), (3, list(range(100, 112)))],
    *[[(1, [5 + i]), (2, [90 + i]), (3, [130 + i])] for i in range(4)],
    [(1, [11])],
]


class Where(NamedTuple):
    place: str
    dtype: torch.dtype
    choose: Callable[[EngineConfig], Device]


def gpu() -> Where:
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return Where("cuda", torch.bfloat16 if half else torch.float16, choose)


GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)
WHERE = [
    pytest.param(Where("cpu", torch.float32, imagined(torch.float32)), id="imagined, fp32"),
    pytest.param(Where("cpu", torch.bfloat16, imagined(torch.bfloat16)), id="imagined, bf16"),
    pytest.param(gpu(), id="cuda", marks=GPU),
]
everywhere = pytest.mark.parametrize("where", WHERE)


def there(where: Where, folder: Path, cache_dir: Path, **settings: Any) -> Any:
    """An engine on that device."""
    given = {"device": where.place if where.place == "cuda" else "auto", **settings}
    return opened(folder, cache_dir, choose_device=where.choose, **given)


def blob_bytes(folder: Path, cache_dir: Path, expert_format: str = "native") -> int:
    with opened(folder, cache_dir, expert_format=expert_format) as loaded:
        return loaded.cache.plan.slot_bytes


def stock(folder: Path, dtype: torch.dtype, place: str, ids: list[int]) -> torch.Tensor:
    """[n, V] of the checkpoint in stock transformers."""
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train(False).to(place)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids], device=place)).logits[0]
    return logits.float().cpu()


@everywhere
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_logits_are_as_near_to_fp32_as_stock_s_own(
    family: str, where: Where, tmp_path: Path
) -> None:
    folder = tiny.build(family, tmp_path / family, torch.bfloat16)
    ids = torch.randint(200, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = stock(folder, torch.float32, "cpu", ids)
    same = stock(folder, where.dtype, where.place, ids)
    steps = [[(1, ids[:12])], [(1, ids[12:16])], *[[(1, [token])] for token in ids[16:]]]
    with there(where, folder, tmp_path / "cache") as loaded:
        found = run_logits(loaded, steps)
    rows = [11, 15, 16, 17, 18, 19]
    error, stocks = (each.norm(dim=1) for each in (found - exact[rows], same[rows] - exact[rows]))
    if where.dtype is torch.float32:
        assert error.max() <= 1e-4
    # In half precision rounding may turn a router's choice, here or there: most rows have none.
    assert error.median() <= 2 * stocks.median() + 1e-4


@everywhere
@pytest.mark.parametrize(
    "expert_format", ["native", "int8", pytest.param("nf4", marks=pytest.mark.slow)]
)
def test_logits_are_bit_identical_for_fewest_and_all_slots(
    expert_format: str, where: Where, tmp_path: Path
) -> None:
    folder = tiny.build("mixtral", tmp_path / "model", torch.bfloat16)
    blob = blob_bytes(folder, tmp_path / "cache", expert_format)
    staging = where.choose(config_of(folder, tmp_path, where)).staging_bytes
    found = []
    for slots, host_slots in ((32, 32), (8, 32), (2, 8), (2, 2)):
        with there(
            where,
            folder,
            tmp_path / "cache",
            expert_format=expert_format,
            device_memory_bytes=slots * blob,
            host_memory_bytes=host_slots * blob + staging,
        ) as loaded:
            assert loaded.cache.plan.slots == slots
            host = loaded.cache.stats().host
            assert host is not None and host.slots == host_slots
            found.append(run_logits(loaded, STEPS))
            loaded.cache.check()
    for logits in found[1:]:
        assert torch.equal(logits, found[0])


@everywhere
def test_dense_int8_is_near_native(where: Where, tmp_path: Path) -> None:
    folder = tiny.build("olmoe", tmp_path / "model", torch.bfloat16)
    rows = []
    for dense_format in ("native", "int8"):
        with there(where, folder, tmp_path / "cache", dense_format=dense_format) as loaded:
            rows.append(run_logits(loaded, [[(1, list(range(40)))]]))
    assert (rows[0] - rows[1]).norm() < 0.05 * rows[0].norm()


@everywhere
def test_who_leaves_in_the_middle_leaves_nothing_behind(where: Where, tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model", torch.bfloat16)
    blob = blob_bytes(folder, tmp_path / "cache")
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with there(where, folder, tmp_path / "cache", device_memory_bytes=4 * blob) as loaded:
        alone = generate(loaded.engine, [[5, 6, 7]], params)[0].ids
        other, mine = Running(8, list(range(60)), params), Running(9, [5, 6, 7], params)
        loaded.engine.add(other)
        loaded.engine.add(mine)
        loaded.engine.step()
        assert loaded.engine.cancel(other) is not None
        while not loaded.engine.idle:
            loaded.engine.step()
            loaded.engine.check()
            loaded.cache.check()
        assert mine.token_ids[:4] == [5, 6, 7, alone[0]]
        assert loaded.engine.runner.held_sequences == 0


@everywhere
def test_the_plan_shows_both_memories_and_keeps_to_them(where: Where, tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model", torch.bfloat16)
    with there(where, folder, tmp_path / "cache") as loaded:
        plan = loaded.plan
        assert plan.host is not None
        assert sum(plan.parts().values()) == plan.total_bytes + plan.host.total_bytes
        lines = "\n".join(plan.lines())
        for words in ("plan of the device", "(--device-memory)", "plan of the host", "--host-mem"):
            assert words in lines
        assert "interpreter" not in lines.partition("of the host")[0]
        assert loaded.cache.plan.holds_all
        assert not loaded.cache.stats().host.used_bytes > plan.host.experts_bytes


def config_of(folder: Path, tmp_path: Path, where: Where) -> EngineConfig:
    return EngineConfig(folder, tmp_path / "cache", device=where.place)


# What needs no GPU to be known -------------------------------------------------------------------


def test_too_small_a_device_is_refused_with_the_sums(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    small = imagined(free_bytes=64 * MIB)
    words = r"the model needs at least .* free of 128 MiB on an imagined device is 64 MiB"
    with (
        pytest.raises(BudgetTooSmall, match=words),
        opened(folder, tmp_path / "c", choose_device=small, kv_memory_bytes=None),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device_memory_bytes": 60_000}, "--device-memory: .*smallest value that works is 96"),
        ({"host_memory_bytes": 60_000}, "--host-memory: .*smallest value that works is 96"),
        ({"device_memory_bytes": 8 << 30}, None),  # more than all experts is not planned
    ],
)
def test_budgets_of_both_tiers_are_checked_by_name(
    settings: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    given = {"device": "auto", "choose_device": imagined()} | settings
    if words is None:
        with opened(folder, tmp_path / "cache", **given) as loaded:
            assert loaded.cache.plan.holds_all
        return
    with (
        pytest.raises(BudgetTooSmall, match=words),
        opened(folder, tmp_path / "cache", **given),
    ):
        pass


def test_behind_a_device_that_holds_all_the_host_keeps_a_layer(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with opened(folder, tmp_path / "cache", choose_device=imagined()) as loaded:
        host = loaded.cache.stats().host
        assert host is not None and host.slots == 8
        assert loaded.cache.plan.slots == 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_without_cuda_is_refused_and_auto_says_why(tmp_path: Path) -> None:
    cause = "without CUDA" if torch.version.cuda is None else "(no NVIDIA driver|no CUDA)"
    with pytest.raises(StartError, match=rf"--device cuda:1: torch .* {cause}.*--device cpu"):
        choose(EngineConfig(tmp_path, tmp_path, device="cuda:1"))
    found = choose(EngineConfig(tmp_path, tmp_path, device="auto"))
    assert found.place.type == "cpu"
    assert "--device auto: torch" in found.why


def test_int4_is_refused_where_no_kernel_reads_it(tmp_path: Path) -> None:
    from moestro.engine.formats.named import codec_of

    with pytest.raises(StartError, match="int4 is for the CPU's kernels alone; on cuda use nf4"):
        codec_of("int4", torch.bfloat16, "cuda")
    folder = tiny.build("mixtral", tmp_path / "model")
    words = "--dense-format int4: this build has native, int8"
    with (
        pytest.raises(StartError, match=words),
        opened(folder, tmp_path / "c", choose_device=imagined(), dense_format="int4"),
    ):
        pass


def test_device_memory_is_refused_where_auto_finds_no_device(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with (
        pytest.raises(StartError, match="--device-memory: .* no memory of its own"),
        opened(
            folder, tmp_path / "c", device="auto", device_memory_bytes=MIB, choose_device=nothing
        ),
    ):
        pass


def test_numbers_cross_as_they_are() -> None:
    found = index_on([3, 1, 2], torch.device("cpu"))
    assert found.dtype == torch.long and found.tolist() == [3, 1, 2]
    assert index_on([], torch.device("cpu")).shape == (0,)
    assert HostCopy(torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 2], [3, 4]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_layer_more_is_one_wait_more(tmp_path: Path) -> None:
    """For its router's ids. In torch's debug mode for synchronisation every wait is a warning."""
    assert _waits(4, tmp_path) - _waits(2, tmp_path) == 2


def _waits(layers: int, folder: Path) -> int:
    """Of a decode step, with all experts resident."""
    import transformers as hf

    widths: dict[str, Any] = {**tiny.WIDTHS, "num_hidden_layers": layers}
    config = hf.MixtralConfig(**widths, num_local_experts=8, num_experts_per_tok=2)
    model = tiny.save(config, folder / f"{layers}", torch.bfloat16)
    with opened(model, folder / "cache", device="cuda") as loaded:
        run_logits(loaded, [[(1, [5])], [(1, [5])]])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run_logits(loaded, [[(2, [5])]])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


def test_key_heads_are_repeated_for_their_query_heads() -> None:
    keys = torch.randn(2, 5, 4)
    found = for_every_head(keys, 6)
    assert found.shape == (6, 5, 4)
    for head in range(6):
        assert torch.equal(found[head], keys[head // 3])


def test_what_has_no_weight_is_marked_before_it_leaves_the_device() -> None:
    ids, weights = torch.tensor([[3, 0], [1, 3]]), torch.tensor([[0.0, 0.5], [0.5, 0.5]])
    marked = mark(ids, weights, 8).tolist()
    assert marked == [[8, 0], [1, 3]]
    ones = [[1.0, 1.0], [1.0, 1.0]]
    wanted = places_by_expert(ids.tolist(), weights.tolist(), 8)
    assert places_by_expert(marked, ones, 8) == wanted == {0: [1], 1: [2], 3: [3]}
    order, starts = sort_by_expert(ids, weights, 8)
    assert starts == [0, 1, 2, 2, 3, 3, 3, 3, 3]
    assert order[:3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33])
def test_an_int8_product_filled_up_for_a_gpu_is_the_same(rows: int) -> None:
    numbers = torch.randint(-127, 128, (rows, 64), dtype=torch.int8)
    weight = torch.randint(-127, 128, (48, 64), dtype=torch.int8).t()
    assert torch.equal(filled_int_mm(numbers, weight), torch._int_mm(numbers, weight))


@pytest.mark.parametrize("shared", [True, False])
def test_int8_rows_apart_filled_up_for_a_gpu_are_the_same(shared: bool) -> None:
    numbers = torch.randint(-127, 128, (1 if shared else 3, 64), dtype=torch.int8)
    weights = [torch.randint(-127, 128, (48, 64), dtype=torch.int8).t() for _ in range(3)]
    rows = numbers.expand(3, 64)
    wanted = [torch._int_mm(row[None], each) for row, each in zip(rows, weights, strict=True)]
    assert torch.equal(filled_int_mm_apart(numbers, weights), torch.cat(wanted))
