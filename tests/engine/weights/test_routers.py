"""A file of routers that is missing, damaged or another model's is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GraniteMoeSharedForCausalLM

from moestro.engine import ROUTERS_NAME, EngineConfig, ModelRefused, RouterFacts, name_routers
from moestro.engine.planning import inspect
from tiny_routed import build_routed

ROUTER = "model.layers.1.block_sparse_moe.router"


def change_facts(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text("utf-8"))
    raw["moestro_routers"] |= changes
    path.write_text(json.dumps(raw), "utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The file with other tensors, and their checksum in config.json."""
    tensors = load_file(folder / ROUTERS_NAME)
    change(tensors)
    save_file(tensors, folder / ROUTERS_NAME)
    facts = RouterFacts.of(folder)
    assert facts is not None
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    stock = {"model_type": raw["moestro_stock_type"], **raw["moestro_stock"]}
    (folder / "config.json").write_text(json.dumps(stock), "utf-8")
    name_routers(folder, facts)


def flip(folder: Path) -> None:
    data = bytearray((folder / ROUTERS_NAME).read_bytes())
    data[-1] ^= 1
    (folder / ROUTERS_NAME).write_bytes(data)


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{ROUTER}.first"] = tensors[f"{ROUTER}.first"][:, :-1].contiguous()


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{ROUTER}.last"]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / ROUTERS_NAME).unlink(), "has no moestro_routers.safetensors"),
    "a bit": (flip, "is damaged or of another model"),
    "empty": (lambda f: (f / ROUTERS_NAME).write_bytes(b""), "is empty"),
    "a shape": (lambda f: rewrite(f, narrow), r"first is \(6, 31\) in the file, \(6, 32\)"),
    "a tensor": (lambda f: rewrite(f, lose), "missing in the files: .*router.last"),
    "other width": (lambda f: change_facts(f, hidden=5), r"\(6, 32\) in the file, \(5, 32\)"),
    "activation": (lambda f: change_facts(f, activation="gelu"), "activation 'gelu'"),
    "tau": (lambda f: change_facts(f, tau=1.5), "tau 1.5"),
    "a word": (lambda f: change_facts(f, bias="yes"), "bias is 'yes', not a whole number"),
    "module": (lambda f: change_facts(f, module="mlp.gate"), "0 modules are called 'mlp.gate'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "relu-bias")
    harm, words = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ModelRefused, match=words) as refused:
        inspect(EngineConfig(folder, tmp_path / "cache"))
    assert "\n" not in str(refused.value)


def test_stock_transformers_refuses_the_folder(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "bias")
    with pytest.raises(ValueError, match="moestro_routed"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(StrictDataclassFieldValidationError, match="only moestro serves"):
        GraniteMoeSharedForCausalLM.from_pretrained(folder)
