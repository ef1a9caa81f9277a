"""Writes the synthetic checkpoints: random weights in a real layout, at the speed of the disk.

Two variants share their experts by hard links: `random` routes evenly, `skewed` as real models do.
Weights are windows of one block of normal numbers, drawn once: 6.9e9 draws would take minutes.
"""

import json
import os
from pathlib import Path

import torch

from .geometry import Geometry, Shapes
from .shards import INDEX_NAME, Fill, write_index, write_shard
from .skew import Skew, embedding, head, router
from .words import write_tokenizer

BLOCK_NUMBERS = 1 << 25  # 64 MiB of bf16
DEVIATION = 0.02
# Of attention's output projections: what all tokens of a context share would grow from layer to
# layer otherwise, until every token chose the same experts.
QUIET_OUTPUT = 0.1


class Windows:
    """Normal numbers of deviation 0.02, bf16, from places of one block that a seed chooses."""

    def __init__(self, seed: int, numbers: int = BLOCK_NUMBERS) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        block = torch.randn(numbers, generator=self.draw).mul_(DEVIATION)
        self._block = block.to(torch.bfloat16)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A copy for tensors larger than the block, else a view into it."""
        wanted, held = torch.Size(shape).numel(), self._block.numel()
        if wanted > held // 2:
            half = held // 2
            parts = [self.take((min(half, wanted - at),)) for at in range(0, wanted, half)]
            return torch.cat(parts).view(shape)
        at = int(torch.randint(held - wanted + 1, (1,), generator=self.draw))
        return self._block[at : at + wanted].view(shape)


def block_numbers(shape: Geometry) -> int:
    """A small model needs no large block."""
    return min(BLOCK_NUMBERS, 2 * shape.numbers)


def make_random(folder: Path, shape: Geometry, twin: Path | None = None, seed: int = 0) -> Path:
    """The variant that routes evenly; experts are linked from `twin` where one is given.

    Does nothing where it lies already.
    """
    windows = Windows(seed, block_numbers(shape))
    gains = {"embed_tokens": 1 / DEVIATION, "o_proj": QUIET_OUTPUT}

    def fill(name: str, wanted: tuple[int, ...]) -> torch.Tensor:
        if len(wanted) == 1:
            return torch.ones(wanted, dtype=torch.bfloat16)
        return windows.take(wanted) * gains.get(name.rsplit(".", 2)[1], 1.0)

    return _write(folder, shape, fill, fill, twin)


def make_skewed(
    folder: Path, twin: Path, shape: Geometry, skew: Skew | None = None, seed: int = 1
) -> Path:
    """The variant that routes unevenly; its experts are the files of `twin`, a random one."""
    windows, skew = Windows(seed, block_numbers(shape)), skew or Skew()
    special = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}

    def fill(name: str, wanted: tuple[int, ...]) -> torch.Tensor:
        if len(wanted) == 1:
            return torch.ones(wanted, dtype=torch.bfloat16)
        made = router if name.endswith("mlp.gate.weight") else special.get(name)
        if made is not None:
            return made(shape, skew, windows.draw).to(torch.bfloat16)
        found = windows.take(wanted)
        return found * QUIET_OUTPUT if name.endswith("o_proj.weight") else found

    return _write(folder, shape, fill, fill, twin)


def _write(
    folder: Path, shape: Geometry, dense: Fill, experts: Fill, twin: Path | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Shapes] = {"dense.safetensors": shape.dense_shapes()}
    files |= {
        f"experts-{layer:02}.safetensors": shape.expert_shapes(layer)
        for layer in range(shape.layers)
    }
    for name, shapes in files.items():
        path = folder / name
        if path.exists():
            continue
        if twin is not None and name != "dense.safetensors":
            os.link(twin / name, path)
        else:
            write_shard(path, shapes, dense if name == "dense.safetensors" else experts)
    index = folder / INDEX_NAME
    if not index.exists():  # a file written anew would make every pack of the model stale
        (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), "utf-8")
        write_tokenizer(folder, shape.vocab)
        write_index(index, files)
    return folder
