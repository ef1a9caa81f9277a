"""What nf4 promises beyond the other formats: all of its state is in the blob."""

import builtins
from typing import Any

import pytest
import torch

from moestro.engine import ModelRefused, StartError
from moestro.engine.formats.nf4 import ABSMAX, CODE, Nf4Codec


def test_four_and_a_half_bits_a_weight_and_the_table() -> None:
    layout = Nf4Codec(torch.float32).layout({"up_proj": (torch.bfloat16, (8, 1024, 512))}, False)
    assert layout == {
        "up_proj": ("uint8", (1024, 256)),
        f"up_proj.{ABSMAX}": ("float32", (1024, 8)),
        f"up_proj.{CODE}": ("float32", (16,)),
    }


def test_what_it_expands_to_is_in_the_table_times_the_largest() -> None:
    torch.manual_seed(0)
    codec = Nf4Codec(torch.float32)
    weight = torch.randn(1, 48, 64)
    one = {key: tensor[0] for key, tensor in codec.encode({"x": weight}, False).items()}
    matrix = codec.open(one, "x", False)
    dense = codec.multiply(torch.eye(64), matrix).t()  # [N, K]
    levels = dense / one[f"x.{ABSMAX}"]
    assert torch.equal(one[f"x.{ABSMAX}"][:, 0], weight[0].abs().amax(dim=1))
    assert (levels[..., None] - one[f"x.{CODE}"]).abs().amin(-1).max() < 1e-6
    widest = one[f"x.{CODE}"].diff().max() / 2
    assert ((dense - weight[0]).abs() <= widest * one[f"x.{ABSMAX}"] + 1e-6).all()


def test_an_opened_matrix_is_views_that_follow_the_slot() -> None:
    codec = Nf4Codec(torch.float32)
    packed = codec.encode({"x": torch.randn(2, 48, 64)}, False)
    slot = {key: tensor[0].clone() for key, tensor in packed.items()}
    matrix, rows = codec.open(slot, "x", False), torch.randn(1, 64)
    for key, tensor in packed.items():
        slot[key].copy_(tensor[1])
    second = codec.open({key: tensor[1] for key, tensor in packed.items()}, "x", False)
    assert torch.equal(codec.multiply(rows, matrix), codec.multiply(rows, second))


def test_rows_of_half_blocks_are_refused() -> None:
    with pytest.raises(ModelRefused, match="rows of up_proj have 48 numbers.*multiples of 32"):
        Nf4Codec(torch.float32).layout({"up_proj": (torch.bfloat16, (8, 64, 48))}, False)


def test_without_bitsandbytes_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(StartError, match=r"nf4 needs bitsandbytes: pip install 'moestro\[nf4\]'"):
        Nf4Codec(torch.float32)
