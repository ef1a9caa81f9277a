"""The synthetic checkpoint, at a size that is made in a moment."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from full.geometry import OLMOE, TINY, Geometry
from full.gguf_file import quantize_q8_0, write_q8_0
from full.maker import Windows, make_random, make_skewed
from full.prompts import write_prompt
from full.skew import Skew
from full.words import SPECIAL, prompt_text, vocabulary
from safetensors import safe_open
from tokenizers import Tokenizer

from engine_kit import opened, run_logits
from moestro.cache import NextUse, Phase, TraceReader, replay
from tiny import oracle

WIDER = replace(TINY, layers=4, experts=32, experts_per_token=4, hidden=128, vocab=1024)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random(tmp_path_factory.mktemp("made") / "random", TINY)


def test_the_large_geometry_is_olmoe_1b_7b() -> None:
    assert OLMOE.numbers == 6_919_161_856
    assert OLMOE.dense_shapes()["model.layers.15.mlp.gate.weight"] == (64, 2048)
    assert len(OLMOE.expert_shapes(0)) == 3 * 64


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_transformers_loads_every_tensor(tmp_path: Path, family: str) -> None:
    folder = make_random(tmp_path / family, replace(TINY, family=family))
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded, info = found
    assert loaded.config.model_type == family
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(p.numel() for p in loaded.parameters()) == replace(TINY, family=family).numbers


def test_the_engine_agrees_with_stock(model: Path, tmp_path: Path) -> None:
    ids = [5, 300, 17, 2, 511, 64]
    with opened(model, tmp_path) as loaded:
        ours = run_logits(loaded, [[(0, ids)]])
    with torch.inference_mode():
        theirs = oracle(model)(torch.tensor([ids])).logits[0, -1:]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_windows_differ_and_repeat_with_the_seed() -> None:
    first, again = Windows(3, 1 << 12), Windows(3, 1 << 12)
    a, b = first.take((8, 8)), first.take((8, 8))
    assert not torch.equal(a, b)
    assert torch.equal(a, again.take((8, 8)))
    larger = first.take((128, 128))  # more than the block holds
    assert larger.shape == (128, 128) and float(larger.float().std()) == pytest.approx(0.02, 0.1)


def test_the_skewed_variant_shares_the_files_of_experts(model: Path, tmp_path: Path) -> None:
    skewed = make_skewed(model.parent / "skewed", model, TINY, Skew(topics=4))
    for path in model.glob("experts-*.safetensors"):
        assert path.samefile(skewed / path.name)
    assert not (model / "dense.safetensors").samefile(skewed / "dense.safetensors")


def test_a_finished_model_is_not_touched_again(model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    make_random(model, TINY)
    assert before == {path: path.stat().st_mtime_ns for path in model.iterdir()}


def hit_rate(folder: Path, scratch: Path) -> float:
    """Of decode, in half of the slots, sampled text."""
    from full.ours import Task, run

    trace = scratch / f"{folder.name}.trace"
    task = Task(
        folder,
        scratch / folder.name,
        experts="native",
        dense="native",
        decode=60,
        repeats=1,
        kv_memory=8 << 20,
        temperature=1.0,
        trace=trace,
    )
    run(task)
    reader = TraceReader(trace)
    per_layer = reader.header.experts_per_layer
    return replay(list(reader), per_layer, sum(per_layer) // 2, NextUse()).hit_rate(Phase.DECODE)


def test_skewed_routing_is_what_a_cache_wants(tmp_path: Path) -> None:
    even = make_random(tmp_path / "even", WIDER)
    skewed = make_skewed(tmp_path / "skewed", even, WIDER, Skew(topics=8))
    assert hit_rate(skewed, tmp_path) > hit_rate(even, tmp_path) + 0.15


def test_the_vocabulary_has_the_wanted_size_and_no_token_twice() -> None:
    tokens, merges = vocabulary(50304)
    assert len(tokens) == len(set(tokens)) == 50304
    known = set(tokens)
    assert all(a in known and b in known for a, b in merges)
    with pytest.raises(ValueError, match="at least 258"):
        vocabulary(257)


def test_text_survives_the_tokenizer(model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    text = "Any text: ß, 漢字, <tags> and  blanks."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == SPECIAL[0] and tokenizer.eos_token_id == 0


@pytest.mark.parametrize("tokens", [1, 7, 256])
def test_a_prompt_has_exactly_the_wanted_tokens(model: Path, tmp_path: Path, tokens: int) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert len(tokenizer.encode(prompt_text(tokenizer, tokens)).ids) == tokens
    file = write_prompt(tmp_path / "prompt.txt", model, tokens)
    assert len(tokenizer.encode(file.read_text("utf-8")).ids) == tokens


def test_q8_0_is_what_the_library_writes() -> None:
    tensor = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    ours = quantize_q8_0(tensor)
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = gguf.quants.quantize(tensor.float().numpy(), kind)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(
        gguf.quants.dequantize(ours, kind), gguf.quants.dequantize(theirs, kind), atol=0.04
    )


def test_the_gguf_holds_the_checkpoints_tensors(model: Path, tmp_path: Path) -> None:
    shape: Geometry = TINY
    reader = gguf.GGUFReader(write_q8_0(model, tmp_path / "model.gguf", shape))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(shape.dense_shapes()) + 3 * shape.layers
    facts = reader.fields
    assert facts["olmoe.expert_count"].contents() == shape.experts
    assert len(facts["tokenizer.ggml.tokens"].contents()) == shape.vocab
    found = tensors["blk.1.ffn_down_exps.weight"]
    weights = gguf.quants.dequantize(found.data, found.tensor_type)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    with safe_open(model / "experts-01.safetensors", "pt") as file:
        wanted = file.get_tensor(name).float().numpy()
    np.testing.assert_allclose(weights.reshape(shape.experts, *wanted.shape)[3], wanted, atol=6e-4)


def test_the_index_names_every_tensor(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == TINY.checkpoint_bytes
    assert len(index["weight_map"]) == len(TINY.dense_shapes()) + 3 * TINY.experts * TINY.layers
