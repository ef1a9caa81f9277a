"""GGUF files as models: tensors, logits and tokens are those of stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engine_kit import logits_of
from gguf_models import END, TEMPLATE, TOKENS, write_gguf
from moestro.engine import EngineConfig
from moestro.engine.forecasts import own_grid_line
from moestro.engine.formats import encode_layer
from moestro.engine.planning import inspect
from moestro.engine.text import Tokenizer
from moestro.engine.weights import Checkpoint
from tile_reference import decode

PROMPT = list(range(20, 50))
WIDE: dict[str, Any] = {"hidden": 256, "inner": 256}
CASES = {
    "qwen3moe Q4_K": ("qwen3moe", Kind.Q4_K, WIDE),
    "qwen2moe Q8_0": ("qwen2moe", Kind.Q8_0, {}),
    "qwen35moe Q8_0": ("qwen35moe", Kind.Q8_0, {}),
    "qwen3moe F32": ("qwen3moe", Kind.F32, {}),
    "minimax-m2 Q4_0": ("minimax-m2", Kind.Q4_0, {}),
    "qwen3moe F16": ("qwen3moe", Kind.F16, {}),
    "qwen3moe BF16": ("qwen3moe", Kind.BF16, {}),
    "qwen2moe Q6_K": ("qwen2moe", Kind.Q6_K, WIDE),
    "qwen2moe F16": ("qwen2moe", Kind.F16, {}),
    "qwen2moe Q5_K": ("qwen2moe", Kind.Q5_K, WIDE),
    "qwen3moe Q5_1": ("qwen3moe", Kind.Q5_1, {}),
    "minimax-m2 IQ4_XS": ("minimax-m2", Kind.IQ4_XS, WIDE),
    "qwen35moe Q6_K": ("qwen35moe", Kind.Q6_K, WIDE),
    "qwen35moe F16": ("qwen35moe", Kind.F16, {}),
    "qwen35moe Q4_0": ("qwen35moe", Kind.Q4_0, {}),
}
FAST = list(CASES)[:3]
EACH = [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES]


@pytest.fixture(scope="module")
def stock() -> Any:
    """transformers' own loading, which asks for accelerate and does not use it on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda: True)
        yield _stock


def _stock(path: Path, **settings: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **settings
    )
    return model.eval()


def written(case: str, folder: Path, **settings: Any) -> Path:
    architecture, kind, widths = CASES[case]
    return write_gguf(folder / "tiny-model.gguf", architecture, kind, **{**widths, **settings})


def logits(model: Path, cache: Path, **settings: Any) -> torch.Tensor:
    return logits_of(model, cache, PROMPT, **settings)


@pytest.mark.parametrize("case", EACH)
def test_tensors_and_logits_are_transformers(case: str, stock: Any, tmp_path: Path) -> None:
    """Bit by bit, and 1e-4. The config is ours: the older reader leaves experts' widths out."""
    path = written(case, tmp_path)
    checkpoint = Checkpoint(path)
    oracle = stock(path, config=checkpoint.config)
    wanted = oracle.state_dict()
    assert checkpoint._slices.keys() == wanted.keys()
    for key, tensor in wanted.items():
        found = checkpoint._slices[key][...]
        assert torch.equal(found.float(), tensor), key
        assert torch.equal(checkpoint._slices[key][1:3], found[1:3])
    found = logits(path, tmp_path / "cache")
    with torch.inference_mode():
        answer = oracle(torch.tensor([[*PROMPT, 7, 8]])).logits[0, len(PROMPT) - 1 :]
    assert (found - answer).abs().max() < 1e-4


@pytest.mark.parametrize("case", [*FAST, "minimax-m2 Q4_0"])
def test_the_config_is_transformers_apart_from_widths_that_it_does_not_read(
    case: str, tmp_path: Path
) -> None:
    path = written(case, tmp_path)
    stock = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    ours, theirs = Checkpoint(path).config.to_dict(), stock.to_dict()
    unlike = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    unlike -= {"quantization_config", "_name_or_path", "_model_name_or_path"}
    older = {"moe_intermediate_size", "shared_expert_intermediate_size"}
    assert unlike <= (set() if case.startswith("qwen35") else older)


def test_floats_keep_their_type_and_norms_are_float32(tmp_path: Path) -> None:
    checkpoint = Checkpoint(written("qwen3moe F16", tmp_path))
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    assert checkpoint.dtype_of(experts) is torch.float16
    assert checkpoint.dtype_of("model.norm.weight") is torch.float32


def test_parts_are_one_model(tmp_path: Path) -> None:
    whole = Checkpoint(written("qwen2moe Q8_0", tmp_path))
    (tmp_path / "split").mkdir()
    first = written("qwen2moe Q8_0", tmp_path / "split", parts=4)
    assert len(list(first.parent.iterdir())) == 4
    for path in (first, first.parent, first.parent / first.name.replace("00001-of", "00003-of")):
        split = Checkpoint(path)
        assert split.config.to_dict() == whole.config.to_dict()
        assert split._slices.keys() == whole._slices.keys()
        for key in whole._slices:
            assert torch.equal(split._slices[key][...], whole._slices[key][...])


@pytest.mark.parametrize("parts", [1, 3])
def test_tied_embeddings(parts: int, tmp_path: Path) -> None:
    tied = Checkpoint(written("qwen3moe F32", tmp_path, parts=parts, tied=True))
    assert tied.config.tie_word_embeddings and "lm_head.weight" not in tied._slices
    inspect(EngineConfig(tied.folder, tmp_path / "cache"))  # nothing is missing


@pytest.mark.parametrize("begins", [False, True])
def test_the_tokenizer_is_in_the_file(begins: bool, tmp_path: Path) -> None:
    path = written("qwen3moe F32", tmp_path, begins=begins)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x", null]}}')
    ours = Tokenizer(path)
    (tmp_path / "tokenizer_config.json").unlink()
    wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("hello wörld", "a  b\n\n12<|im_end|>", "日本"):
        assert ours.encode(text) == wanted(text)["input_ids"]
        own = ours.encode(text)[int(begins) :]
        assert ours.decode(own, skip_special_tokens=False) == text
    assert (ours.encode("hell") == [TOKENS.index("hell")]) is not begins
    assert ours.stop_ids == {END}
    assert ours.info.chat_template == TEMPLATE
    assert (
        ours.render_chat(
            [{"role": "user", "content": "hell"}],
            tools=None,
            add_generation_prompt=True,
            continue_final_message=False,
            kwargs={},
        )
        == "user: hell<|im_end|>assistant:"
    )


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    first = written("qwen3moe F32", tmp_path, parts=2)
    before = Checkpoint(first).fingerprint()
    assert Checkpoint(tmp_path).fingerprint() == before
    last = max(tmp_path.glob("*.gguf"))
    last.write_bytes(last.read_bytes() + b"\0")
    assert Checkpoint(first).fingerprint() != before


@pytest.mark.parametrize(
    ("architecture", "kind", "zero"),
    [
        ("qwen3moe", Kind.Q4_0, "none"),
        ("qwen3moe", Kind.Q4_1, "float"),
        pytest.param("minimax-m2", Kind.Q4_0, "none", marks=pytest.mark.slow),
        pytest.param("qwen35moe", Kind.Q4_1, "float", marks=pytest.mark.slow),
        pytest.param("qwen2moe", Kind.Q4_1, "float", marks=pytest.mark.slow),
    ],
)
def test_blocks_of_int4_are_kept_as_they_are(
    architecture: str, kind: Kind, zero: str, tmp_path: Path
) -> None:
    """In int4, each weight is what the gguf library decodes, to the bit."""
    path = write_gguf(tmp_path / "tiny-model.gguf", architecture, kind)
    config = EngineConfig(path, tmp_path / "cache", expert_format="int4")
    blueprint = inspect(config)
    entry, model = blueprint.experts[-1], blueprint.build_model()
    rest, codes = blueprint.checkpoint.load_codes(model, entry)
    (packed,) = encode_layer(blueprint.codec, entry, rest, codes)
    for name, whole in blueprint.checkpoint.load_experts(model, entry).items():
        form = entry.grids[name]
        assert (form.kind, form.scale, form.zero) == ("int4", "float16", zero)
        assert whole.dtype is torch.float32
        for expert, wanted in enumerate(whole):
            assert torch.equal(decode(packed[name][expert], form, *wanted.shape), wanted)
    found, native = (logits(path, tmp_path / "cache", expert_format=f) for f in ("int4", "native"))
    assert 0 < (found - native).abs().max() < 0.05 * native.abs().max()
    line = own_grid_line(config, blueprint)
    assert line is not None and line.endswith("kept as it is")


def test_blocks_of_other_kinds_are_decoded(tmp_path: Path) -> None:
    path = written("qwen2moe Q8_0", tmp_path)
    blueprint = inspect(EngineConfig(path, tmp_path, expert_format="int4"))
    assert not blueprint.experts[0].grids and "Q8_0" in blueprint.experts[0].no_grid
    assert own_grid_line(EngineConfig(path, tmp_path), blueprint) is None
