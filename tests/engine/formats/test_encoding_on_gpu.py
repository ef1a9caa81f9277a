"""A GPU encodes experts to the bytes that the CPU gives: a pack serves both."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from moestro.engine import ModelRefused
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


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_native_is_kept_there_as_it_is_computed_with(stored: torch.dtype) -> None:
    """Turing computes in fp16: what is bf16 in the file would be converted at each use."""
    expert = {"up_proj": torch.full((1, 8, 16), 0.1, dtype=stored)}
    expert["up_proj_bias"] = torch.ones(1, 8)
    source = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expert.items()}
    codec = codec_of("native", torch.float16, "cuda")
    assert codec.layout(source, False) == {
        "up_proj": ("float16", (8, 16)),
        "up_proj_bias": ("float32", (8,)),
    }
    kept = codec.encode(expert, False)
    assert torch.equal(kept["up_proj"], expert["up_proj"].half())
    assert kept["up_proj_bias"] is expert["up_proj_bias"]


def test_shapes_that_a_gpu_does_not_multiply_are_refused() -> None:
    odd = {"up_proj": (torch.bfloat16, (4, 96, 60))}
    with pytest.raises(ModelRefused, match="--expert-format int8: up_proj is 96 x 60"):
        codec_of("int8", torch.bfloat16, "cuda").layout(odd, False)
    codec_of("int8", torch.bfloat16, "cpu", rows=True).layout(odd, False)
