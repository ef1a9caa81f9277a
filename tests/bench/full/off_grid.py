"""The demo moved off the 4-bit grid that its weights lie on, without a change of what it computes.

The demo is made of a 4-bit file with groups of 32, and whatever rounds to such groups again finds
nothing to round. Between two linear maps a channel may be scaled as one likes, if the rows that
write it are multiplied by a factor and the columns that read it are divided by it:

    v_proj rows  ·f │ o_proj columns    ·1/f    a kv head's channel has a column per query head
    up rows      ·f │ down columns      ·1/f    of every expert and of the shared one
    a norm's weight ·f │ columns of q, k, v (router, gate, up) ·1/f       only with `norms`
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
NOTE = ".moestro-files.json"  # of the original's bytes
# Factors are even in their logarithm between 1 / SPREAD and SPREAD: enough to leave no group on
# its grid, too little to make groups that no trained model has.
SPREAD = 2**0.5

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Heads:
    """Of grouped attention."""

    query: int
    kv: int
    width: int

    def per_query_head(self, channels: torch.Tensor) -> torch.Tensor:
        """[kv * width] -> [query * width]: the channel that each column of o_proj reads."""
        shared = self.query // self.kv
        return channels.view(self.kv, 1, self.width).expand(-1, shared, -1).reshape(-1)


def make_off_grid(source: Path, out: Path, *, norms: bool = False, seed: int = 11) -> Path:
    """Writes `out`, a folder like `source` (GraniteMoeShared, one file) in fp32 where moved.

    Does nothing where it lies already.
    """
    if (out / WEIGHTS).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name not in (WEIGHTS, NOTE):
            shutil.copyfile(path, out / path.name)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config = config.get("moestro_stock", config)  # where layers differ in their number of experts
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(source / WEIGHTS)
    for layer in range(config["num_hidden_layers"]):
        move_layer(tensors, f"model.layers.{layer}.", heads(config), draw)
        if norms:
            move_norms(tensors, f"model.layers.{layer}.", draw)
    part = out / "weights.part"
    save_file(tensors, part, {"format": "pt"})
    part.replace(out / WEIGHTS)
    return out


def heads(config: dict[str, Any]) -> Heads:
    query = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // query
    return Heads(query, config["num_key_value_heads"], width)


def move_layer(tensors: Tensors, prefix: str, heads: Heads, draw: torch.Generator) -> None:
    """Changes the tensors of one layer: v against o, up against down."""
    value, out = f"{prefix}self_attn.v_proj.weight", f"{prefix}self_attn.o_proj.weight"
    factors = drawn(heads.kv * heads.width, draw)
    tensors[value] = scaled(tensors[value], factors[:, None])
    tensors[out] = scaled(tensors[out], 1 / heads.per_query_head(factors))
    for block in ("block_sparse_moe", "shared_mlp"):
        into, back = f"{prefix}{block}.input_linear.weight", f"{prefix}{block}.output_linear.weight"
        if into not in tensors:
            continue
        gate_up, down = tensors[into], tensors[back]  # [..., 2M, H], [..., H, M]
        factors = drawn(down[..., 0, :].numel(), draw).view(*down.shape[:-2], down.shape[-1])
        both = torch.cat([torch.ones_like(factors), factors], dim=-1)
        tensors[into] = scaled(gate_up, both[..., None])
        tensors[back] = scaled(down, 1 / factors[..., None, :])


def move_norms(tensors: Tensors, prefix: str, draw: torch.Generator) -> None:
    """Changes both norms of one layer against all that read them."""
    readers = {
        "input_layernorm": [f"self_attn.{part}_proj" for part in "qkv"],
        "post_attention_layernorm": [
            "block_sparse_moe.router.layer",
            "block_sparse_moe.input_linear",
            "shared_mlp.input_linear",
        ],
    }
    for norm, names in readers.items():
        weight = f"{prefix}{norm}.weight"
        factors = drawn(len(tensors[weight]), draw)
        tensors[weight] = scaled(tensors[weight], factors)
        for name in (f"{prefix}{each}.weight" for each in names):
            if name in tensors:
                tensors[name] = scaled(tensors[name], 1 / factors)


def drawn(count: int, draw: torch.Generator) -> torch.Tensor:
    """Factors as fp64, so that what is rounded is the weight alone."""
    evenly = torch.rand(count, generator=draw, dtype=torch.float64)
    return SPREAD ** (2 * evenly - 1)


def scaled(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (weight.double() * factors).float()
