"""The formats by the names that the flags give them."""

import torch

from .formats import Codec, Int8Codec, NativeCodec
from .formats_int4 import Int4Codec

FORMATS = ("native", "int8", "int4")


def codec_of(name: str, compute_dtype: torch.dtype) -> Codec:
    """The codec that `--expert-format` names (one of FORMATS)."""
    if name == "int4":
        return Int4Codec()
    return NativeCodec(compute_dtype) if name == "native" else Int8Codec()
