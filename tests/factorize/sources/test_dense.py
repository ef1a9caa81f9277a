import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.factorize import SourceRefused
from moestro.factorize.sources.dense import DenseModel
from tiny_llama import write_tiny_llama


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_it_finds(dense: Path) -> None:
    model = DenseModel.open(dense)
    assert (model.layers, model.neurons, model.hidden) == (3, 48, 32)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen3"}, "type 'qwen3'.*router file beside"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "type 'gemma2'.*soft caps"),
        ({"model_type": "gpt2"}, "type 'gpt2'; Llama, Mistral.*are carried"),
        ({"model_type": "olmo", "clip_qkv": 8.0}, "clip_qkv"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, "a part of each head"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"model_type": "nobody-knows"}, "not readable"),
        ({"hidden_size": "32"}, "not readable.*hidden_size"),
        ({"num_attention_heads": [4]}, "not readable.*num_attention_heads"),
        ({"rope_parameters": "default"}, "not readable.*rope"),
    ],
)
def test_no_exact_twin(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    change_config(folder, **changes)
    with pytest.raises(SourceRefused, match=words):
        DenseModel.open(folder)


def test_not_a_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceRefused, match="no config.json"):
        DenseModel.open(tmp_path)
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceRefused, match="no model.safetensors"):
        DenseModel.open(folder)


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SourceRefused, match="not readable"):
        DenseModel.open(folder)


def test_a_missing_part(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceRefused, match="lacks model-00001-of-00001.safetensors"):
        DenseModel.open(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SourceRefused, match="the weights in .* are not readable"):
        DenseModel.open(folder)


def test_the_hash_is_of_the_content(dense: Path, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    before = DenseModel.open(folder).content_sha256()
    assert before == DenseModel.open(dense).content_sha256()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "more": "words"})
    assert DenseModel.open(folder).content_sha256() == before
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert DenseModel.open(folder).content_sha256() != before
