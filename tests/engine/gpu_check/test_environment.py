"""What a machine without a GPU is told."""

import pytest
import torch

from moestro.engine import StartError
from moestro.engine.gpu_check.environment import find_device


@pytest.mark.parametrize("name", ["auto", "tpu"])
def test_only_a_gpu_or_an_imagined_one_is_checked(name: str) -> None:
    with pytest.raises(StartError, match="cuda, cuda:N, or cpu"):
        find_device(name)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_build_without_cuda_is_named() -> None:
    with pytest.raises(StartError, match="is built without CUDA: install a torch for your GPU"):
        find_device("cuda")


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("The NVIDIA driver on your system is too old (found version 12040).", "update NVIDIA's"),
        ("Found no NVIDIA driver on your system.", "install NVIDIA's driver; in a container"),
    ],
)
def test_torch_s_own_words_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, said: str, advice: str
) -> None:
    def init() -> None:
        raise RuntimeError(f"{said}\nmore of it")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(StartError) as refused:
        find_device("cuda")
    assert f"for CUDA 13.0 says: {said}" in str(refused.value)
    assert advice in str(refused.value)
    assert "more of it" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_gpu_that_is_hidden_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(StartError, match="sees 0 CUDA devices .*docker run --gpus all"):
        find_device("cuda:1")
