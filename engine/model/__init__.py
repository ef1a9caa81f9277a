"""The stock model with moestro's hooks: attention, KV, experts, and the guess ahead."""

from .attention import GPU_SINK_BLOCK_BYTES, UnknownKeyword, install
from .expert_math import MathByFlags
from .experts import OffloadedExperts, StepPhase, bind, experts_aside
from .host_share import HostShare
from .kv import KVStore, PackedCache, SequenceKV, Span
from .meta_model import build_meta_model
from .prefetch import Prefetch, next_gates
from .regret import Regret
from .thin import ThinMlp, ThinRouter, agrees
from .thin_layer import ThinLayer
from .thinner import Thinner
from .topology import RouterPlace, Topology

__all__ = [
    "GPU_SINK_BLOCK_BYTES",
    "HostShare",
    "KVStore",
    "MathByFlags",
    "OffloadedExperts",
    "PackedCache",
    "Prefetch",
    "Regret",
    "RouterPlace",
    "SequenceKV",
    "Span",
    "StepPhase",
    "ThinLayer",
    "ThinMlp",
    "ThinRouter",
    "Thinner",
    "Topology",
    "UnknownKeyword",
    "agrees",
    "bind",
    "build_meta_model",
    "experts_aside",
    "install",
    "next_gates",
]
