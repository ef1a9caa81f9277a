"""What is measured with CUDA's own calls, on an imagined GPU whose speeds are known.

Its race detector judges the measurements, too.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from moestro.engine.gpu_check import Bench, Found, Sizes
from moestro.engine.gpu_check.correctness import correctness
from moestro.engine.gpu_check.link import arbitration, link
from moestro.engine.gpu_check.pinning import pinning
from moestro.engine.gpu_check.sampling import sampling
from moestro.engine.loader import load

MIB = 1 << 20
SIZES = Sizes(
    limit_s=100.0,
    register_bytes=(MIB, 4 * MIB, 16 * MIB),
    link_bytes=16 * MIB,
    expert_copy_bytes=12 * MIB,
    vocab_size=100,
    samples=2,
)
MIB_MS = 1e-3  # how long a MiB takes to cross
Made = Callable[[Gpu], tuple[FakeCuda, Bench]]


def gpu(register_bytes: float = float("inf")) -> Gpu:
    return Gpu(4 << 30, MIB / MIB_MS, call_s=1e-9, register_bytes=register_bytes)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """An imagined GPU, and a bench on it whose clock is the GPU's."""
    with ExitStack() as stack:

        def make(gpu: Gpu) -> tuple[FakeCuda, Bench]:
            cuda = stack.enter_context(installed(FakeCuda(gpu)))
            ends_s, name = time.monotonic() + 100, "an imagined GPU"
            clock = lambda: cuda.timeline.now_s  # noqa: E731
            return cuda, Bench(cuda.device, name, SIZES, tmp_path, load, ends_s, clock)

        yield make


def test_pieces_are_pinned_and_given_back(made: Made) -> None:
    cuda, bench = made(gpu())
    found = Found()
    pinning(bench, found)
    assert [row["code"] for row in found.facts["registered"]] == [0, 0, 0]
    assert cuda.registered == []
    assert not found.problems


def test_a_refused_piece_is_told_and_no_fault_where_smaller_ones_are_pinned(made: Made) -> None:
    _, bench = made(gpu(register_bytes=4 * MIB))
    found = Found()
    pinning(bench, found)
    assert [row["code"] for row in found.facts["registered"]] == [0, 0, 2]
    assert "16 MiB: refused after" in found.lines[-1]
    assert not found.problems


def test_nothing_pinned_at_all_is_a_problem(made: Made) -> None:
    _, bench = made(gpu(register_bytes=0))
    found = Found()
    pinning(bench, found)
    assert found.problems == ["not even the smallest piece was pinned"]


def test_the_link_s_rate_is_found(made: Made) -> None:
    _, bench = made(gpu())
    found = Found()
    link(bench, found)
    assert len(found.facts) == 4
    for rates in found.facts.values():
        assert list(rates) == ["0.5 MiB", "2 MiB", "8 MiB"]
        assert all(rate == pytest.approx(MIB / MIB_MS, rel=1e-3) for rate in rates.values())


def test_a_small_copy_is_found_to_wait_for_the_whole_expert(made: Made) -> None:
    """As one copy engine for each direction has it, whatever the streams."""
    _, bench = made(gpu())
    found = Found()
    arbitration(bench, found)
    assert found.facts["expert_copy_s"] == pytest.approx(12 * MIB_MS, rel=1e-3)
    small = found.facts["64_bytes_on_the_compute_stream"]
    assert small["share_of_expert_copy"] == pytest.approx(1.0, rel=1e-2)
    chunk = found.facts["one_chunk_on_a_second_copy_stream"]
    assert chunk["alone_s"] == pytest.approx(2 * MIB_MS, rel=1e-3)
    assert chunk["beside_s"] == pytest.approx(14 * MIB_MS, rel=1e-3)


def test_logits_come_to_the_host_for_sampling(made: Made) -> None:
    _, bench = made(gpu())
    found = Found()
    sampling(bench, found)
    assert all(seconds > 0 for seconds in found.facts["token_s"].values())


@pytest.mark.slow
def test_the_engine_is_found_correct_there(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the fake's modes are those of one thread
    _, bench = made(gpu())
    found = Found()
    correctness(bench, found, "native")
    assert not found.problems
    assert (found.facts["all_resident"]["slots"], found.facts["half_resident"]["slots"]) == (16, 8)
    assert 0 < found.facts["all_resident"]["median"] < 0.1  # it computes in bf16
