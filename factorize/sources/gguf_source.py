"""Turns one GGUF file into a plain Hugging Face folder. Knows Llama only."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    modeling_gguf_pytorch_utils,
)

from moestro.engine import Progress, ProgressFn
from moestro.factorize.facts import SourceRefused

gguf_reader: Any = modeling_gguf_pytorch_utils  # untyped


def convert(gguf: Path, folder: Path, progress: ProgressFn) -> None:
    """Writes bf16 weights, configuration and tokenizer into the empty `folder`.

    The dequantized weights are the model from then on. Raises SourceRefused.
    """
    progress(Progress("convert", 0, 0))
    config = _read_config(gguf)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    save_file(_read_tensors(gguf, config, progress), folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    generation: Any = GenerationConfig
    generation(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)


def _read_config(gguf: Path) -> LlamaConfig:
    read = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    if read.model_type != "llama":
        raise SourceRefused(f"{gguf.name} is a {read.model_type} model; only Llama is read")
    # a fresh configuration: the one that was read says "quantized", and nobody may save that
    unwanted = ("quantization_config", "_name_or_path", "_model_name_or_path")
    config = LlamaConfig(**{k: v for k, v in read.to_dict().items() if k not in unwanted})
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    return config


def _read_tensors(gguf: Path, config: LlamaConfig, progress: ProgressFn) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config)
    # from_pretrained(gguf_file=…) would do the same, but only with one more package installed
    with _bar_to(progress):
        tensors: dict[str, torch.Tensor] = gguf_reader.load_gguf_checkpoint(
            str(gguf), return_tensors=True, model_to_load=shapes, torch_dtype=torch.bfloat16
        )["tensors"]
    expected = {name: tensor.shape for name, tensor in shapes.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise SourceRefused(f"{gguf.name} does not hold the tensors of its own configuration")
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


@contextmanager
def _bar_to(progress: ProgressFn) -> Iterator[None]:
    """The reader draws its own bar on stderr; ours walks the same tensors and reports them."""

    def walk(tensors: Iterable[Any], **_: object) -> Iterator[Any]:
        listed = list(tensors)
        for done, tensor in enumerate(listed):
            progress(Progress("convert", done, len(listed), "tensors"))
            yield tensor
        progress(Progress("convert", len(listed), len(listed), "tensors"))

    bar = gguf_reader.tqdm
    gguf_reader.tqdm = walk
    try:
        yield
    finally:
        gguf_reader.tqdm = bar
