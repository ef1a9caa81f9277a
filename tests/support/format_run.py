"""One source format of weights through the whole path of the engine, against stock transformers.

Stock runs on what the format's own formula makes of the files, in fp32. Where a tile can hold the
files' numbers, the experts are kept in it as well. The product with fp8 takes floats, so the engine
is held to stock's logits again; those with int4 and mxfp4 round the other side to int8, so stock
runs on the weights read out of the engine's pack: rounded once more they would differ.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from gguf import GGMLQuantizationType as Ggml

import gguf_models
from engine_kit import ignore
from family_run import TOLERANCE, compare, equal_plans, greedy
from family_sizes import EXPERTS, LAYERS
from moestro.cache import Phase
from moestro.engine import EngineConfig
from moestro.engine.formats import keeps_grids, tile_format
from moestro.engine.phases import Phases
from moestro.engine.planning import inspect, plan_memory
from moestro.engine.weight_loading import load_weights
from moestro.engine.weights import Checkpoint
from quantized_files import KINDS, write_mxfp4, write_quantized
from tile_reference import decode
from tiny_families import build, oracle

WIDE = 256  # numbers in a block of a K-quant
ARCHITECTURES = {  # of GGUF files, by the model type that they are read as
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_5_moe_text": "qwen35moe",
    "minimax_m2": "minimax-m2",
}
THREE = ("mixtral", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class Source:
    """One format of files: how it is written here, and in which format experts are kept as is."""

    kind: str | Ggml  # of `quantized_files`, MXFP4, or of GGUF's blocks
    kept: str = ""
    families: tuple[str, ...] = THREE


MXFP4 = "mxfp4"
SOURCES = {
    "FP8 in blocks": Source("fp8", "fp8"),
    "MXFP4": Source(MXFP4, "mxfp4", ("gpt_oss", "llama4_text")),
    "GPTQ": Source("gptq", "int4"),
    "GPTQ in act-order": Source("gptq reordered", "int4"),
    "AWQ": Source("awq", "int4"),
    "compressed-tensors, pack-quantized": Source("packed int4", "int4"),
    "compressed-tensors, int-quantized": Source("int8 rows"),
    "compressed-tensors, float-quantized": Source("fp8 rows", "fp8"),
    "bitsandbytes, 4 bits": Source("nf4 nested"),
    "bitsandbytes, 8 bits": Source("int8 of bitsandbytes"),
    "GGUF, Q8_0": Source(Ggml.Q8_0, "", tuple(ARCHITECTURES)),
    "GGUF, Q4_0": Source(Ggml.Q4_0, "int4", ("qwen2_moe", "minimax_m2")),
    "GGUF, Q4_1": Source(Ggml.Q4_1, "int4", ("qwen3_moe", "qwen3_5_moe_text")),
    "GGUF, Q6_K": Source(Ggml.Q6_K, "", tuple(ARCHITECTURES)),
}


@dataclass(frozen=True)
class Cell:
    """Largest differences of a logit: of decoded experts, and of those kept as they are."""

    decoded: float
    kept: float | None = None


def cell_of(source: Source, family: str, folder: Path) -> Cell:
    """Write a tiny model of `family` below `folder` in the format and hold the engine to stock."""
    if isinstance(source.kind, Ggml):
        model, stock = _gguf(source.kind, family, folder)
    else:
        model, stock = _folder(source.kind, family, folder)
        equal_plans(model, folder)
    decoded = compare(stock, model, folder / "cache").difference
    if not source.kept:
        return Cell(decoded)
    if source.kept != "fp8":
        return Cell(decoded, _of_tiles(stock, model, folder / "cache", source.kept))
    blueprint = equal_plans(model, folder, expert_format=source.kept)
    assert blueprint is not None
    assert all(keeps_grids(blueprint.codec, entry) for entry in blueprint.experts)
    kept = compare(stock, model, folder / "cache", expert_format=source.kept)
    return Cell(decoded, kept.difference)


def _folder(kind: str, family: str, folder: Path) -> tuple[Path, Any]:
    """The model, and stock on the values of its weights."""
    plain, model = build(family, folder / "plain"), folder / "model"
    if kind == MXFP4:
        twin = write_mxfp4(plain, model)
    else:
        twin = write_quantized(plain, model, KINDS[kind])
    assert Checkpoint(model).quantization is not None
    return model, oracle(family, twin)


def _gguf(kind: Ggml, family: str, folder: Path) -> tuple[Path, Any]:
    """The file, and stock on it by transformers' reader, which decodes everything."""
    wide: dict[str, Any] = {"hidden": WIDE, "inner": WIDE} if kind is Ggml.Q6_K else {}
    with _as_large_as_others():
        path = gguf_models.write_gguf(
            folder / "tiny-model.gguf", ARCHITECTURES[family], kind, **wide
        )
    config = Checkpoint(path).config
    assert config.model_type == family and config.num_hidden_layers == LAYERS
    with pytest.MonkeyPatch.context() as patch:  # it asks for accelerate and uses none on a CPU
        patch.setattr(hf.modeling_utils, "is_accelerate_available", lambda: True)
        stock = hf.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    return path, stock.train(False)


@contextmanager
def _as_large_as_others() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_models, "LAYERS", LAYERS)
        patch.setattr(gguf_models, "EXPERTS", EXPERTS)
        yield


def _of_tiles(stock: Any, model: Path, cache: Path, name: str) -> float:
    """Largest difference of stock's logits when its experts are those of the engine's pack.

    Leaves `stock` with these. Raises AssertionError for a layer that was rounded, and above
    TOLERANCE.
    """
    _prompt, ids, wanted = greedy(stock)
    config = EngineConfig(model, cache, expert_format=name)
    blueprint = inspect(config)
    plan = plan_memory(config, blueprint)
    _model, experts_cache = load_weights(config, blueprint, plan, Phases(ignore))
    replaced = 0
    with closing(experts_cache), torch.no_grad():
        for layer, entry in enumerate(blueprint.experts):
            assert name == MXFP4 or keeps_grids(blueprint.codec, entry)
            experts = stock.get_submodule(entry.path)
            everyone = list(range(entry.num_experts))
            with experts_cache.acquire(layer, everyone, Phase.DECODE) as lease:
                for expert, tensors in lease:
                    for matrix in ("gate_up_proj", "down_proj"):
                        own = getattr(experts, matrix)[expert]
                        own = own.T if entry.transposed else own
                        form = entry.grids.get(matrix) or tile_format(name, own.dtype, own.shape[1])
                        tiles = tensors[matrix]
                        found = decode(tiles.view(-1, tiles.shape[-1]), form, *own.shape)
                        if matrix in entry.orders:
                            found = found[:, tensors[f"{matrix}.order"].argsort()]
                        own.copy_(found)
                        replaced += 1
    assert replaced == 2 * sum(entry.num_experts for entry in blueprint.experts)
    _prompt, again, found = greedy(stock)
    difference = float((found - wanted).abs().max())
    assert again == ids and difference < TOLERANCE, f"of tiles: {difference:.1e}"
    return difference
