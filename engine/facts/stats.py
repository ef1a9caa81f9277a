"""What the engine counts, as frozen snapshots taken between two steps. Knows no Prometheus."""

from dataclasses import dataclass
from enum import Enum

from moestro.cache import CacheStats as CacheStats  # the door hands both on
from moestro.cache import TierStats as TierStats


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
    lane: str  # how the sequences of a step go through it
    created_s: int  # unix time of the load
    neuron_layers: int = 0  # MLPs whose neurons a prompt chooses, where it chooses experts
    sequence_density: float = 0.0  # what a prompt keeps where no router chooses; else 0


@dataclass(frozen=True, slots=True)
class RecallStats:
    """Guesses about one experts module, held against what it asked for; decode steps only."""

    guessed: int  # experts that were named
    right: int  # of these, asked for
    asked: int  # experts asked for, named or not, whenever there was a guess
    chosen: int  # named, lacking in the cache, and among the best: to be read ahead
    chosen_right: int  # of these, asked for


@dataclass(frozen=True, slots=True)
class PrefetchStats:
    """Reading ahead: what it knows, and whether it pays."""

    on: bool
    pauses: int  # times it switched itself off
    gain_s: float  # stall avoided, and spent for it, in the windows that were settled
    cost_s: float
    layers: tuple[RecallStats, ...]  # aligned with the cache's; none where it was never on


SEQUENCE_CHOICES = ("token", "sequence", "short_prompt")
"""Who chose the experts of a sequence's answer: each token; its prompt; each token, since the

prompt was too short to tell."""


@dataclass(frozen=True, slots=True)
class SelectionStats:
    """Sequences whose prompt is computed, by who chooses the experts of their answers."""

    requests: dict[str, int]  # by SEQUENCE_CHOICES
    kept_experts: int  # of all layers of the sequences whose prompt chose
    known_experts: int  # that they chose from
    neuron_copies_bytes: int = 0  # of running ones: what they keep of neurons that all tokens run


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
    prefetch: PrefetchStats
    selection: SelectionStats
