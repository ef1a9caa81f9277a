"""Shapes of the synthetic model: which tensors it has and how many bytes they are. No tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

BF16_BYTES = 2
GIB = 1 << 30
LAYER_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Geometry:
    """One decoder of `layers` MoE layers, every one with `experts` experts."""

    layers: int = 16
    experts: int = 64
    experts_per_token: int = 8
    hidden: int = 2048
    expert_width: int = 1024
    heads: int = 16
    vocab: int = 50304
    context_tokens: int = 8192
    family: str = "olmoe"  # or qwen3_moe: the same shapes in a layout that more runtimes know

    @property
    def expert_numbers(self) -> int:
        """Weights of one expert."""
        return len(EXPERT_PARTS) * self.hidden * self.expert_width

    @property
    def depth(self) -> float:
        """Layers as a share of OLMoE-1B-7B's: what memory groups scale with."""
        return self.layers / 16

    @property
    def active_dense_numbers(self) -> int:
        """Of `active_numbers` those of no expert."""
        dense = self.layers * (4 * self.hidden**2 + self.experts * self.hidden)
        return dense + self.vocab * self.hidden

    @property
    def active_numbers(self) -> int:
        """Weights that one token is multiplied with, the head included."""
        experts = self.layers * self.experts_per_token * self.expert_numbers
        return experts + self.active_dense_numbers

    @property
    def numbers(self) -> int:
        tensors = [self.dense_shapes(), *map(self.expert_shapes, range(self.layers))]
        return sum(prod(shape) for shapes in tensors for shape in shapes.values())

    @property
    def checkpoint_bytes(self) -> int:
        return BF16_BYTES * self.numbers

    def expert_shapes(self, layer: int) -> Shapes:
        """The checkpoint's names of all experts of one layer."""
        wide, narrow = (self.expert_width, self.hidden), (self.hidden, self.expert_width)
        return {
            f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight": (
                narrow if part == "down_proj" else wide
            )
            for expert in range(self.experts)
            for part in EXPERT_PARTS
        }

    def dense_shapes(self) -> Shapes:
        """Everything that is no expert."""
        whole = (self.vocab, self.hidden)
        shapes: Shapes = {"model.embed_tokens.weight": whole}
        for layer in range(self.layers):
            shapes |= dict(self._layer_shapes(f"model.layers.{layer}."))
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": whole}

    def _layer_shapes(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in LAYER_PARTS:
            yield f"{prefix}self_attn.{part}.weight", (self.hidden, self.hidden)
        normed = self.hidden if self.family == "olmoe" else self.hidden // self.heads
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            yield f"{prefix}{norm}.weight", (normed,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (self.hidden,)
        yield f"{prefix}mlp.gate.weight", (self.experts, self.hidden)

    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint, in the words of transformers."""
        own: dict[str, dict[str, Any]] = {
            "olmoe": {"architectures": ["OlmoeForCausalLM"], "clip_qkv": None},
            "qwen3_moe": {
                "architectures": ["Qwen3MoeForCausalLM"],
                "head_dim": self.hidden // self.heads,
                "moe_intermediate_size": self.expert_width,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
        }
        shared: dict[str, Any] = {
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.expert_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "norm_topk_prob": False,
            "hidden_act": "silu",
            "max_position_embeddings": self.context_tokens,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "rope_theta": 10000.0,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }
        return shared | own[self.family]


OLMOE = Geometry()
OLMOE8 = replace(OLMOE, layers=8)  # the same widths at half the depth, for a disk of 15 GB
TINY = Geometry(
    layers=2,
    experts=8,
    experts_per_token=2,
    hidden=64,
    expert_width=32,
    heads=4,
    vocab=512,
    context_tokens=512,
)
# The width of the model that the fixed cost of a layer is measured on: hardly any arithmetic.
NARROW = Geometry(layers=4, hidden=64, expert_width=32, heads=4, vocab=512, context_tokens=512)
GEOMETRIES = {"olmoe": OLMOE, "olmoe8": OLMOE8, "tiny": TINY, "narrow": NARROW}
