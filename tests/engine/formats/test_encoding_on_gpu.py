"""A GPU encodes experts to the bytes that the CPU gives: a pack serves both."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from moestro.engine.formats import codec_of

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)


@contextmanager
def imagined() -> Iterator[FakeCuda]:
    with installed(FakeCuda(Gpu())) as cuda:
        yield cuda


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("where", [imagined, pytest.param(nullcontext, marks=GPU)])
def test_a_gpu_gives_the_cpu_s_bytes(where: type, name: str, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = {
        "up_proj": torch.randn((2, 96, 128), generator=generator).bfloat16(),
        "down_proj": torch.randn((2, 128, 96), generator=generator).bfloat16(),
        "up_proj_bias": torch.randn((2, 96), generator=generator).bfloat16(),
    }
    here = codec_of(name, torch.bfloat16, "cpu", rows=True).encode(experts, transposed)
    with where() as cuda:
        there = codec_of(name, torch.bfloat16, "cuda").encode(experts, transposed)
        if cuda is not None:
            copies = [x for x in cuda.timeline.queued if x.engine is cuda.to_device]
            assert len(copies) == 4  # each matrix crossed
            assert not any(cuda.on_device(tensor) for tensor in there.values())
    assert there.keys() == here.keys()
    for key, tensor in here.items():
        assert there[key].device.type == "cpu" and there[key].dtype == tensor.dtype
        assert torch.equal(there[key], tensor), key
