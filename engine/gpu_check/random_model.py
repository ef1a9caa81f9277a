"""Random models in their real checkpoint layout, at the speed of the disk.

Weights are windows of one block of normal numbers, drawn once: billions of draws take minutes.
"""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .geometry import Geometry

BLOCK_NUMBERS = 1 << 24
QUIET_OUTPUT = 0.1  # of attention


class Windows:
    """Normal numbers of deviation 1, bf16, from places of one block that a seed chooses."""

    def __init__(self, seed: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._block = torch.randn(BLOCK_NUMBERS, generator=self._draw).to(torch.bfloat16)

    def fill(self, target: torch.Tensor, std: float) -> None:
        flat = target.view(-1)
        for at in range(0, len(flat), BLOCK_NUMBERS // 2):
            part = flat[at : at + BLOCK_NUMBERS // 2]
            places = BLOCK_NUMBERS - len(part) + 1
            first = int(torch.randint(places, (1,), generator=self._draw))
            part.copy_(self._block[first : first + len(part)]).mul_(std)


def write_model(shape: Geometry, folder: Path, seed: int = 0) -> Path:
    """A checkpoint in bf16 with a byte-level tokenizer; returns `folder`.

    Holds all of the model's weights in memory meanwhile.
    """
    config = hf.AutoConfig.for_model(shape.family, **shape.config_fields())
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16
        )
    model.to_empty(device="cpu")
    windows = Windows(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith(("bias", "sinks")) else 1.0)
            elif name.endswith("bias"):
                weight.zero_()
            else:
                windows.fill(weight, _deviation(name, shape))
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _deviation(name: str, shape: Geometry) -> float:
    """Such that each token chooses experts of its own.

    What all tokens of a context share would else outgrow, through attention, what tells them apart.
    """
    if name.endswith(("mlp.gate.weight", "router.weight")):
        return shape.router_std
    if name.endswith("embed_tokens.weight"):
        return 1.0
    return QUIET_OUTPUT * shape.std if name.endswith("o_proj.weight") else shape.std


def _write_tokenizer(folder: Path) -> None:
    """256 bytes, then <eos>, <bos>, <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>", "<pad>"])
    wrapped = hf.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    wrapped.save_pretrained(folder)
