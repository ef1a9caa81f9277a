"""The families that are carried, by model type, and what stands against the others.

A family is switched on by its entry in FAMILIES. The twin must choose by the raw logits and take
the softmax of the chosen ones: the only form of router whose gates can all be 1/k while the order
stays. A softmax (or sigmoid) over all experts that is even to 1e-4 loses the order in float32.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from .family import Family
from .folded import Gemma, Olmo, Phi3
from .llama import Granite, InputBiased, Llama, Windowed

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Llama("Llama"),
        "mistral": Windowed("Mistral"),
        "ministral": Windowed("Ministral"),
        "qwen2": InputBiased("Qwen2"),
        "seed_oss": InputBiased("Seed-OSS"),
        "smollm3": Windowed("SmolLM3"),
        "granite": Granite("Granite"),
        "gemma": Gemma("Gemma"),
        "phi3": Phi3("Phi-3"),
        "olmo": Olmo("OLMo"),
    }
)

_NEEDS_ROUTERS = (
    "takes a softmax over all experts, which loses the order of gates that are all alike; it needs "
    "a router file beside the checkpoint"
)
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "qwen3": f"the class that has its norms of queries and keys (qwen3_moe) {_NEEDS_ROUTERS}",
        "olmo2": f"the class that has its norms behind the blocks (flex_olmo) {_NEEDS_ROUTERS}",
        "hunyuan_v1_dense": "the class that has its norms of queries and keys (hunyuan_v1_moe) "
        f"{_NEEDS_ROUTERS}",
        "gemma2": "no class with experts has its soft caps",
        "gemma3_text": "no class with experts has its two bases of rotation with norms of queries "
        "and keys",
        "olmo3": "no class with experts has its norms behind the blocks with a window",
        "phi": "its feed-forward layers have no gate, but biases",
        "starcoder2": "its feed-forward layers have no gate, but biases",
    }
)


def carried_words() -> str:
    """The carried families as people call them, in one line."""
    *first, last = [family.title for family in FAMILIES.values()]
    return f"{', '.join(first)} and {last}"


def obstacles(config: Any) -> Iterator[str]:
    """Why a dense model has no exact twin; nothing when it has one."""
    kind = getattr(config, "model_type", None)
    family = FAMILIES.get(str(kind))
    if family is None:
        why = REFUSED.get(str(kind), f"{carried_words()} are carried")
        yield f"it is of the type {kind!r}; {why}"
        return
    yield from family.obstacles(config)
