"""The formats by the names that the flags give them."""

import torch

from moestro.engine.facts import StartError

from .int4 import Int4Codec
from .matrices import Codec, Int8Codec, NativeCodec
from .nf4 import Nf4Codec

FORMATS = ("native", "int8", "int4", "nf4")
CPU_ONLY = {"int4"}  # torch's CUDA kernel wants another order of the packed bytes


def codec_of(name: str, compute_dtype: torch.dtype, device: str = "cpu") -> Codec:
    """The codec that `--expert-format` names (one of FORMATS), to compute on a kind of device.

    Raises StartError where that is not possible.
    """
    if name in CPU_ONLY and device != "cpu":
        raise StartError(
            f"--expert-format {name} is for the CPU's kernels alone; on {device} use nf4 (as small)"
            " or int8, or compute with --device cpu"
        )
    match name:
        case "nf4":
            return Nf4Codec(compute_dtype)
        case "int4":
            return Int4Codec()
        case "int8":
            return Int8Codec(compute_dtype)
        case _:
            return NativeCodec(compute_dtype)
