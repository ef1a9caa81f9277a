"""GGUF files read as a model's folder: transformers' config, tokenizer and tensors out of them."""

from .header import is_gguf
from .source import GgufSource, carried_architectures
from .splits import gguf_paths, gguf_stem

__all__ = ["GgufSource", "carried_architectures", "gguf_paths", "gguf_stem", "is_gguf"]
