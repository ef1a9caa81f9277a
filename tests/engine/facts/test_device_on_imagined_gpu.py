"""What the engine asks of a GPU, asked of an imagined one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import tiny
from engine_kit import ignore, opened, run_logits
from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from imagined import imagined
from moestro.cache import Pack, TierPlan, Wiring
from moestro.cache.tiers.link import Link
from moestro.cache.tiers.slots import Arena, SlotArena
from moestro.engine import EngineConfig, StartError
from moestro.engine.facts.device import CPU, Device, HostCopy, Indices, choose, index_on, unused_gpu
from moestro.engine.loader import load
from moestro.engine.weights.linears import HostEmbedding


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with installed(FakeCuda(Gpu(memory_bytes=1 << 30, copy_bytes_per_s=1e6))) as cuda:
        yield cuda


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "auto"])
def test_a_gpu_is_found_with_its_memory(tmp_path: Path, cuda: FakeCuda, name: str) -> None:
    torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    found = choose(EngineConfig(tmp_path, tmp_path, device=name))
    assert (found.place, found.compute_dtype) == (cuda.device, torch.bfloat16)
    assert found.room is not None and found.room.name == "an imagined GPU, cuda:0"
    assert (found.room.free_bytes, found.room.total_bytes) == ((1 << 30) - (1 << 20), 1 << 30)
    assert found.wire is not None and found.staging_bytes > 0


def test_a_gpu_that_is_not_there_or_does_not_answer_is_refused(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with pytest.raises(StartError, match="there are 1 CUDA devices"):
        choose(EngineConfig(tmp_path, tmp_path, device="cuda:1"))
    cuda.stick_in(0)
    with pytest.raises(StartError, match="--device cuda: CUDA error: illegal address"):
        choose(EngineConfig(tmp_path, tmp_path, device="cuda"))


def test_indices_cross_without_a_wait_and_in_order(cuda: FakeCuda) -> None:
    begun_s = cuda.timeline.now_s
    places = index_on([3, 1, 2], cuda.device)
    assert places.device == cuda.device
    assert cuda.timeline.now_s - begun_s < 24 / 1e6  # not even the copy has had its time
    assert (places + 1).tolist() == [4, 2, 3]
    assert index_on([], cuda.device).shape == (0,)


def test_indices_in_the_middle_of_a_layer_do_not_cross(cuda: FakeCuda) -> None:
    indices, seen = Indices(), len(cuda.timeline.queued)
    for values in ([5, 6, 7, 2, 2, 3], [4], list(range(300)), [1, 0]):
        found = indices.on(values, cuda.device)
        assert found.device == cuda.device and found.dtype == torch.int64
        assert all(each.engine is not cuda.to_device for each in cuda.timeline.queued[seen:])
        assert found.tolist() == values
    assert indices.on([], cuda.device).shape == (0,)


def test_numbers_come_to_the_host_when_their_event_has(cuda: FakeCuda) -> None:
    numbers = torch.arange(6, device="cuda").view(2, 3)
    asked = HostCopy(numbers)
    cuda.kernel("what is queued between", duration_s=60.0)
    assert asked.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cuda.timeline.now_s < 1.0


def test_a_whole_engine_computes_there_what_it_computes_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy, wait and product of a prompt and of two tokens, under the race detector."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the modes are those of one thread
    folder = tiny.build("mixtral", tmp_path / "model")
    steps = [[(1, [5, 6, 7])], [(1, [8])], [(1, [9])]]
    with (
        installed(FakeCuda(Gpu(4 << 30))),
        opened(folder, tmp_path / "there", device="cuda") as loaded,
    ):
        there = run_logits(loaded, steps).cpu()
        stats = loaded.cache.stats()
        embedding = loaded.engine.runner.lane.model.get_input_embeddings()
        assert isinstance(embedding, HostEmbedding)
        assert embedding._table.device.type == "cpu" and not list(embedding.parameters())
        assert loaded.plan.host is not None
        table_bytes = embedding._table.numel() * embedding._table.itemsize
        assert loaded.plan.host.parts()["host_dense"] == table_bytes
    assert stats.host is not None and stats.host.link.copies > 0
    with opened(folder, tmp_path / "here", choose_device=imagined(torch.bfloat16)) as loaded:
        here = run_logits(loaded, steps)
    assert len(there) == len(steps) and torch.equal(there, here)


def test_memory_that_others_take_while_it_loads_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind the weights: at the first KV, in the self-check."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the modes are those of one thread
    folder = tiny.build("mixtral", tmp_path / "model")
    config = EngineConfig(
        folder, tmp_path / "cache", device="cuda", kv_memory_bytes=1 << 20, threads=1
    )

    def fill(cuda: FakeCuda, *_: object) -> None:
        cuda.used_bytes = cuda.gpu.memory_bytes

    def filled_behind_the_slots(cuda: FakeCuda, config: EngineConfig) -> Device:
        device = choose(config)

        def wire(pack: Pack, plan: TierPlan) -> Wiring:
            assert device.wire is not None
            own = device.wire(pack, plan)

            def both(host: SlotArena) -> tuple[Arena, Link]:
                made = own(host)
                fill(cuda)
                return made

            return both

        return replace(device, wire=wire)

    for behind in (False, True):
        cuda = FakeCuda(Gpu(4 << 30))
        progress = ignore if behind else partial(fill, cuda)
        choose_device = partial(filled_behind_the_slots, cuda) if behind else choose
        with (
            installed(cuda),
            pytest.raises(StartError, match="less memory is free there .* lower --device-memory"),
        ):
            load(config, progress, choose_device=choose_device)


def test_a_gpu_that_is_here_and_unused_is_told_with_cause_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unused_gpu(CPU, tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    with installed(FakeCuda()):
        assert "--device auto computes on it" in str(unused_gpu(CPU, tmp_path))
        there = choose(EngineConfig(tmp_path, tmp_path, device="cuda"))
        assert unused_gpu(there, tmp_path) is None

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told = str(unused_gpu(CPU, tmp_path))
    assert "for CUDA 13.0: The NVIDIA driver on your system is too old (found version 12020" in told
    assert "update NVIDIA's driver, or install a torch for the CUDA that it has" in told
    with pytest.raises(StartError, match=r"too old .*update NVIDIA's driver"):
        choose(EngineConfig(tmp_path, tmp_path, device="cuda"))
    assert "too old" in choose(EngineConfig(tmp_path, tmp_path, device="auto")).why
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install a torch" in str(unused_gpu(CPU, tmp_path))
