"""What the bars' modules do around their turns: room on the disk, and verdicts."""

from pathlib import Path

import pytest
from full import p1_decode, p2_prefill, p3_disk, p5_overhead
from full.bench import Bench
from full.geometry import OLMOE, OLMOE8, TINY, Geometry
from full.places import Workshop

QUANTIZER = '#!/bin/sh\necho "$@" >>"$0.log"\nhead -c 1000 "$2" >"$3"\n'


def bench_in(folder: Path, shape: Geometry = TINY) -> Bench:
    return Bench(Workshop(folder / "shop"), folder / "peers", shape, folder)


def with_llama(bench: Bench) -> Path:
    """A quantizer that writes something; the path of its log."""
    programs = bench.peers / "build" / "bin"
    programs.mkdir(parents=True)
    for name in ("llama-bench", "llama-quantize"):
        (programs / name).write_text(QUANTIZER)
        (programs / name).chmod(0o755)
    return programs / "llama-quantize.log"


def pack(bench: Bench, experts: str) -> None:
    """As a turn of moestro leaves it."""
    (bench.cache(experts) / "packs").mkdir(parents=True, exist_ok=True)


def there(bench: Bench) -> set[str]:
    """Packs and GGUF files on the disk."""
    found = [*bench.shop.folder.glob("cache-*"), *bench.shop.folder.glob("*.gguf")]
    return {path.name for path in found}


def test_one_pack_and_one_gguf_lie_there_at_a_time(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    log = with_llama(bench)
    for experts, kind in p2_prefill.PAIRS:
        model = bench.pair(experts, kind)
        assert model is not None and model.exists()
        pack(bench, experts)
        assert there(bench) == {f"cache-{experts}", model.name}
    assert len(log.read_text().splitlines()) == 1


def test_no_pack_lies_beside_two_ggufs(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    with_llama(bench)
    bench.pair("int8", "q8_0")
    pack(bench, "int8")
    bench.gguf("q4_0")
    assert there(bench) == {"olmoe2-random-q4_0.gguf"}


def test_without_llama_one_pack_lies_there(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    for experts in ("int8", "int4"):
        assert bench.pair(experts, "q8_0") is None
        pack(bench, experts)
        assert there(bench) == {f"cache-{experts}"}


def test_what_was_found_is_never_removed(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    found = bench.shop.folder / "cache-int8"
    found.mkdir(parents=True)
    bench.only()
    assert found.exists()


DECODE = {
    "ours": 10.0,
    "peer": 10.0,
    "bytes": 1e9,
    "share": 0.6,
    "memory": 16e9,
    "ours_two": 15.0,
    "peer_two": 14.0,
    "memory_two": 26e9,
}


def test_the_verdicts_of_decode(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    p1_decode.judge(bench, "int8", DECODE)
    assert [bar.met for bar in bench.bars] == [False, True, True, True]
    assert bench.bars[0].wanted == 1.05 and bench.bars[2].wanted == 60
    assert "1.50 x, memory 1.62 x" in bench.bars[3].name


def test_decode_without_llama_keeps_the_bars_of_the_memory(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    found = {name: value for name, value in DECODE.items() if not name.startswith("peer")}
    p1_decode.judge(bench, "int4", found)
    assert len(bench.bars) == 2 and len(bench.missing) == 1


def test_a_layer_without_a_clock_is_judged_by_the_step(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    stock = {"block": 4.0, "layer": 8.0, "step": 40.0}
    ours = {"block": 1.0, "layer": 2.1, "step": 30.0}
    p5_overhead.judge(bench, {"ours-native": ours, "ours-int8": {"step": 9.0}, "stock": stock})
    assert [bar.met for bar in bench.bars] == [True, False, True]
    assert len(bench.missing) == 2


@pytest.mark.parametrize(("shape", "wanted"), [(OLMOE, 2_200_000_000), (OLMOE8, 1_500_000_000)])
def test_the_memory_group_holds_as_large_a_share_at_half_the_depth(
    tmp_path: Path, shape: Geometry, wanted: int
) -> None:
    assert p3_disk.group_bytes(bench_in(tmp_path, shape)) == wanted
