"""What the engine counts, as frozen snapshots taken between two steps. Knows no Prometheus."""

from dataclasses import dataclass
from enum import Enum

from moestro.cache import CacheStats


class EngineState(Enum):
    """LOADING -> READY -> DRAINING -> STOPPED; any of them -> FAILED."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of the loaded model that a client may see."""

    family: str  # config.model_type
    max_model_len_tokens: int
    vocab_size: int
    num_layers: int
    moe_layers: int
    num_experts: int
    experts_per_token: int
    expert_bytes: int
    expert_format: str
    created_s: int  # unix time of the load


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One consistent snapshot."""

    requests_running: int
    requests_waiting: int
    requests_finished: dict[str, int]  # by FinishReason.value, every reason present
    prompt_tokens: int  # computed
    generation_tokens: int
    prefill_steps: int
    decode_steps: int
    kv_used_bytes: int
    kv_capacity_bytes: int
    corrupted_requests: int  # ended because their logits were not finite
    load_s: dict[str, float]  # seconds by phase of the start
    planned_bytes: dict[str, int]  # the memory plan by part; the process stays below the sum
    cache: CacheStats
