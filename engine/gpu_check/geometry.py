"""Widths of real models, and how much of one fits into a budget. No tensors."""

from dataclasses import dataclass, replace
from typing import Any

from moestro.cache import human_bytes

from .found import CannotRun

BF16_BYTES = 2
VOCAB_SIZE = 1024  # the head is no part of what is measured here


@dataclass(frozen=True, slots=True)
class Geometry:
    """One model's widths. `family` is transformers' model type."""

    name: str
    family: str
    hidden: int
    inner: int  # of one expert
    experts: int
    experts_per_token: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    std: float = 0.02  # of random weights
    router_std: float = 0.1

    @property
    def expert_bytes(self) -> int:
        """In bf16: gate, up and down."""
        return 3 * self.hidden * self.inner * BF16_BYTES

    @property
    def experts_bytes(self) -> int:
        return self.layers * self.experts * self.expert_bytes

    @property
    def words(self) -> str:
        return (
            f"{self.layers} layers of {self.experts} experts, {self.experts_per_token} a token,"
            f" hidden {self.hidden}, inner {self.inner}"
        )

    def config_fields(self) -> dict[str, Any]:
        """For transformers' config of `family`: each has its own name for the same number."""
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 2048,
            "num_experts_per_tok": self.experts_per_token,
            "eos_token_id": 256,
            "bos_token_id": 257,
            "pad_token_id": 258,
        }
        if self.family == "qwen3_moe":
            return sizes | {"num_experts": self.experts, "moe_intermediate_size": self.inner}
        if self.family == "gpt_oss":
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            return sizes | {"num_local_experts": self.experts, "rope_parameters": rope}
        return sizes | {"num_local_experts": self.experts}


MIXTRAL = Geometry("Mixtral 8x7B", "mixtral", 4096, 14336, 8, 2, 32, 8, 128, 32)
QWEN3 = Geometry("Qwen3-30B-A3B", "qwen3_moe", 2048, 768, 128, 8, 32, 4, 128, 48)
GPT_OSS = Geometry("gpt-oss-20b", "gpt_oss", 2880, 2880, 32, 4, 64, 8, 64, 24)
REAL_WIDTHS = (QWEN3, GPT_OSS, MIXTRAL)
LEAST_LAYERS = 2


def fitted(real: Geometry, room_bytes: int, most_layers: int) -> Geometry:
    """As many layers as fit, and only where not even two do, fewer experts.

    Raises CannotRun where half of the experts, again and again, are still too many.
    """
    found = real
    while LEAST_LAYERS * found.experts * found.expert_bytes > room_bytes:
        if found.experts // 2 < 2 * found.experts_per_token:
            least = LEAST_LAYERS * found.experts * found.expert_bytes
            raise CannotRun(
                f"two layers of {found.experts} experts take {human_bytes(least)}, there is room"
                f" for {human_bytes(room_bytes)}"
            )
        found = replace(found, experts=found.experts // 2)
    layers = room_bytes // (found.experts * found.expert_bytes)
    return replace(found, layers=min(layers, most_layers, real.layers))
