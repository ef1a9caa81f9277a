"""The formats by the names that the flags give them, and how each lies where it computes."""

import torch

from moestro.engine.facts import StartError
from moestro.engine.kernels import library

from .int4 import Int4Codec
from .matrices import Codec, Int8Codec, NativeCodec
from .nf4 import Nf4Codec
from .tiled import TileCodec

AUTO = "auto"  # which one of FORMATS it is, the start settles by the device's memory
FORMATS = ("native", "int8", "int4", "mxfp4", "fp8", "nf4")
CPU_ONLY = {"int4", "mxfp4", "fp8"}  # no kernel of a GPU takes the bytes in their order
TILED = ("native", "int8", "int4", "mxfp4", "fp8")
TILES_ALONE = {"mxfp4", "fp8"}  # torch has no product with them


def codec_of(
    name: str, compute_dtype: torch.dtype, device: str = "cpu", *, rows: bool = False
) -> Codec:
    """The codec that `--expert-format` names (one of FORMATS), to compute on a kind of device.

    In tiles where the library computes, unless `rows` are asked for. Raises StartError where that
    is not possible.
    """
    if name in CPU_ONLY and device != "cpu":
        raise StartError(
            f"--expert-format {name} is for the CPU's kernels alone; on {device} use nf4 (as small)"
            " or int8, or compute with --device cpu"
        )
    if name in TILED and not rows and in_tiles(compute_dtype, device):
        return TileCodec(name)
    if name in TILES_ALONE:
        raise StartError(
            f"--expert-format {name}: only moestro's own library multiplies with it, and it is not "
            "here: install a C compiler and moestro again, or take int4"
        )
    match name:
        case "nf4":
            return Nf4Codec(compute_dtype, device)
        case "int4":
            return Int4Codec()
        case "int8":
            return Int8Codec(compute_dtype, device)
        case "native":
            return NativeCodec(compute_dtype, device)
        case _:
            raise ValueError(f"{name!r} is none of {', '.join(FORMATS)}")


def in_tiles(compute_dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether the library computes there; torch does elsewhere, with matrices in rows."""
    return device == "cpu" and compute_dtype == torch.float32 and library() is not None
