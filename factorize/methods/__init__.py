"""How a dense model is observed, and its neurons are split into experts and routed to."""

from .calibration import load_dense, load_tokenizer, quiet_bars, read_windows
from .clusters import CLUSTER_ROUNDS, SWAP_POINTS
from .fit import make_plan
from .sampling import SAMPLED_AT_ONCE
from .split import CLUSTER_TOKENS
from .trained_router import BATCH_TOKENS

__all__ = [
    "BATCH_TOKENS",
    "CLUSTER_ROUNDS",
    "CLUSTER_TOKENS",
    "SAMPLED_AT_ONCE",
    "SWAP_POINTS",
    "load_dense",
    "load_tokenizer",
    "make_plan",
    "quiet_bars",
    "read_windows",
]
