"""The stock model with moestro's hooks: attention, KV, experts, and the guess ahead."""

from .attention import install
from .expert_math import MathByFlags
from .experts import OffloadedExperts, StepPhase, bind, experts_aside
from .host_share import HostShare
from .kv import KVStore, PackedCache, SequenceKV
from .meta_model import build_meta_model
from .prefetch import Prefetch, next_gates
from .regret import Regret
from .scoring import HeldStates
from .thinner import Thinner
from .topology import Topology, run_packed, trace

__all__ = [
    "HeldStates",
    "HostShare",
    "KVStore",
    "MathByFlags",
    "OffloadedExperts",
    "PackedCache",
    "Prefetch",
    "Regret",
    "SequenceKV",
    "StepPhase",
    "Thinner",
    "Topology",
    "bind",
    "build_meta_model",
    "experts_aside",
    "install",
    "next_gates",
    "run_packed",
    "trace",
]
