"""The stock model with moestro's hooks: attention, KV, experts, and the guess ahead."""

from .attention import UnknownKeyword, install
from .expert_math import MathByFlags
from .experts import OffloadedExperts, StepPhase, bind, experts_aside
from .host_share import HostShare
from .kv import KVStore, PackedCache, SequenceKV, Span
from .meta_model import build_meta_model
from .prefetch import Prefetch, next_gates
from .regret import Regret
from .thin import ThinRouter
from .thinner import Thinner
from .topology import RouterPlace, Topology

__all__ = [
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
    "ThinRouter",
    "Thinner",
    "Topology",
    "UnknownKeyword",
    "bind",
    "build_meta_model",
    "experts_aside",
    "install",
    "next_gates",
]
