"""The C library of the products: found beside this file, loaded once, called through ctypes.

ctypes lets other Python threads run while a call computes. A build without a C compiler has no
library; then torch's products serve, which are slower.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

from moestro.engine.facts import StartError

FILE = Path(__file__).with_name("_native.so")
MISSING = (
    "the products of this build are torch's, which decode at a fraction of the speed: install a C"
    " compiler (on Debian: apt-get install gcc libc6-dev) and moestro again"
)

REBUILD = "install moestro again (in a checkout: make dev)"


class MatrixStruct(ctypes.Structure):
    """`matrix` of src/moestro.h."""

    _fields_ = (
        ("tiles", c_void_p),
        ("tile_bytes", c_int64),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("padded", c_int32),
        ("format", c_int32),
        ("group", c_int32),
        ("scale_type", c_int32),
        ("zero_kind", c_int32),
        ("row_group", c_int32),
        ("order", c_void_p),
    )


class ExpertStruct(ctypes.Structure):
    """`expert` of src/moestro.h."""

    _fields_ = (
        ("first", MatrixStruct),
        ("down", MatrixStruct),
        ("first_bias", c_void_p),
        ("down_bias", c_void_p),
    )


class ExpertCall(ctypes.Structure):
    """`expert_call` of src/calls.h."""

    _fields_ = (
        ("experts", c_void_p),
        ("which", c_void_p),
        ("starts", c_void_p),
        ("tokens", c_void_p),
        ("places", c_void_p),
        ("hidden", c_void_p),
        ("results", c_void_p),
        ("inner", c_void_p),
        ("inner_stride", c_int64),
        ("count", c_int32),
        ("hidden_rows", c_int32),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("activation", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
        ("energies", c_void_p),
    )


class GroupCall(ctypes.Structure):
    """`group_call` of src/calls.h."""

    _fields_ = (
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("which", c_void_p),
        ("starts", c_void_p),
        ("rows", c_void_p),
        ("places", c_void_p),
        ("room", c_void_p),
        ("tokens", c_int32),
        ("k", c_int32),
        ("experts", c_int32),
    )


class AttentionStruct(ctypes.Structure):
    """`attention` of src/step.h."""

    _fields_ = (
        ("query", MatrixStruct),
        ("key", MatrixStruct),
        ("value", MatrixStruct),
        ("output", MatrixStruct),
        ("query_bias", c_void_p),
        ("key_bias", c_void_p),
        ("value_bias", c_void_p),
        ("output_bias", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("query_norm_width", c_int32),
        ("key_norm_width", c_int32),
        ("heads", c_int32),
        ("key_heads", c_int32),
        ("dim", c_int32),
        ("rotary", c_int32),
        ("eps", c_float),
        ("scaling", c_float),
    )


class AttentionCall(ctypes.Structure):
    """`attention_call` of src/step.h."""

    _fields_ = (
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("rows", c_void_p),
        ("starts", c_void_p),
        ("out", c_void_p),
        ("pool_rows", c_int64),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
        ("count", c_int32),
    )


class AttendCall(ctypes.Structure):
    """`attend_call` of src/step.h."""

    _fields_ = (
        ("q", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("rows", c_void_p),
        ("starts", c_void_p),
        ("out", c_void_p),
        ("pool_rows", c_int64),
        ("count", c_int32),
        ("heads", c_int32),
        ("key_heads", c_int32),
        ("dim", c_int32),
    )


class PromptCall(ctypes.Structure):
    """`prompt_call` of src/step.h."""

    _fields_ = (
        ("q", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("out", c_void_p),
        ("states", c_void_p),
        ("q_head", c_int64),
        ("q_token", c_int64),
        ("key_head", c_int64),
        ("key_token", c_int64),
        ("value_head", c_int64),
        ("value_token", c_int64),
        ("tokens", c_int32),
        ("length", c_int32),
        ("heads", c_int32),
        ("key_heads", c_int32),
        ("dim", c_int32),
        ("value_dim", c_int32),
        ("scaling", c_float),
    )


class RouteCall(ctypes.Structure):
    """`route_call` of src/step.h."""

    _fields_ = (
        ("x", c_void_p),
        ("matrix", c_void_p),
        ("bias", c_void_p),
        ("logits", c_void_p),
        ("shares", c_void_p),
        ("room", c_void_p),
        ("chosen", c_void_p),
        ("count", c_int32),
        ("inputs", c_int32),
        ("experts", c_int32),
        ("k", c_int32),
        ("normalized", c_int32),
    )


class LayerStruct(ctypes.Structure):
    """`layer_head` of src/layer.h."""

    _fields_ = (
        ("attention", AttentionStruct),
        ("first_norm", c_void_p),
        ("second_norm", c_void_p),
        ("router", c_void_p),
        ("router_bias", c_void_p),
        ("first_eps", c_float),
        ("second_eps", c_float),
        ("residual", c_float),
        ("width", c_int32),
        ("experts", c_int32),
        ("k", c_int32),
        ("normalized", c_int32),
    )


class LayerCall(ctypes.Structure):
    """`layer_call` of src/layer.h."""

    _fields_ = (
        ("attention", AttentionCall),
        ("hidden", c_void_p),
        ("stream", c_void_p),
        ("normed", c_void_p),
        ("logits", c_void_p),
        ("shares", c_void_p),
        ("room", c_void_p),
        ("chosen", c_void_p),
    )


class TailCall(ctypes.Structure):
    """`tail_call` of src/layer.h."""

    _fields_ = (
        ("shared", c_void_p),
        ("given", c_void_p),
        ("experts", c_void_p),
        ("stream", c_void_p),
        ("residual", c_float),
        ("count", c_int32),
        ("width", c_int32),
    )


# `moestro_gemm` of src/gemm.h: rows, weights, sums; how many rows, outputs and inputs.
GEMM = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32)

_STRUCTS: tuple[type[ctypes.Structure], ...] = (
    MatrixStruct,
    ExpertStruct,
    ExpertCall,
    AttentionStruct,
    AttentionCall,
    AttendCall,
    RouteCall,
    LayerStruct,
    LayerCall,
    TailCall,
    GroupCall,
    PromptCall,
)
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "moestro_available": (c_char_p, (c_int,)),
    "moestro_chosen": (c_char_p, ()),
    "moestro_choose": (c_int, (c_char_p,)),
    "moestro_fetch_ahead": (None, (c_int,)),
    "moestro_use_gemm": (None, (GEMM, c_int32)),
    "moestro_struct_bytes": (c_int64, (c_int32,)),
    "moestro_pool_set_threads": (c_int, (c_int,)),
    "moestro_pool_threads": (c_int, ()),
    "moestro_experts": (c_int64, (POINTER(ExpertCall),)),
    "moestro_experts_first": (c_int64, (POINTER(ExpertCall),)),
    "moestro_experts_down": (c_int64, (POINTER(ExpertCall),)),
    "moestro_group": (c_int32, (POINTER(GroupCall),)),
    "moestro_linear": (
        c_int64,
        (c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_int64),
    ),
    "moestro_attention": (c_int64, (c_void_p, POINTER(AttentionCall))),
    "moestro_place": (c_int64, (c_void_p, POINTER(AttentionCall))),
    "moestro_attend": (None, (POINTER(AttendCall),)),
    "moestro_attend_prompt": (None, (POINTER(PromptCall),)),
    "moestro_layer_head": (c_int64, (c_void_p, POINTER(LayerCall))),
    "moestro_layer_tail": (c_int64, (POINTER(TailCall),)),
    "moestro_route": (None, (POINTER(RouteCall),)),
    "moestro_normalize": (None, (c_void_p, c_void_p, c_float, c_int32, c_int32, c_void_p)),
    "moestro_combine": (None, (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p)),
    "moestro_activate": (
        None,
        (c_int32, c_void_p, c_void_p, c_int32, c_int32, c_float, c_float),
    ),
}


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its functions with their types.

    Raises StartError where it does not load, or was built of other sources than this file's.
    """
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise StartError(f"{path} does not load ({error}); {REBUILD}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name, None)
        if function is None:
            raise StartError(f"{path} has no {name}: it is of another version; {REBUILD}")
        function.restype, function.argtypes = result, arguments
    for number, struct in enumerate(_STRUCTS):
        if found.moestro_struct_bytes(number) != ctypes.sizeof(struct):
            raise StartError(f"{path} was built for another {struct.__name__}; {REBUILD}")
    return found


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """None where this build has none."""
    return load(FILE) if FILE.exists() else None


def instruction_sets() -> list[str]:
    """Those of the library that this processor has, the best first."""
    found, names = library(), list[str]()
    while found is not None and (name := found.moestro_available(len(names))) is not None:
        names.append(name.decode())
    return names


def choose(name: str) -> None:
    """Compute with this one of `instruction_sets()` from now on."""
    found = library()
    if found is None or found.moestro_choose(name.encode()):
        raise ValueError(f"{name!r} is none of {instruction_sets()}")


def fetch_ahead(whether: bool | None) -> None:
    """Whether weights are asked for before a lone row needs them; None: as the processor likes it.

    Results are the same to the bit. Raises ValueError where there is no library.
    """
    found = library()
    if found is None:
        raise ValueError("this build has no library")
    found.moestro_fetch_ahead(-1 if whether is None else int(whether))


def chosen() -> str | None:
    """The instruction set that the products compute with; None where torch's serve."""
    found = library()
    return None if found is None else str(found.moestro_chosen().decode())


def set_pool_threads(count: int) -> int:
    """How many threads the products are computed by from now on, this one among them.

    Fewer than `count` where the system gives no more; 1 where torch's products serve, whose threads
    are torch's own.
    """
    found = library()
    return 1 if found is None else int(found.moestro_pool_set_threads(count))
