"""What is not a whole, plain MoE checkpoint is refused before anything is loaded."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import tiny
from engine_kit import generate, opened, run_logits
from moestro.engine import ModelNotFound, ModelRefused, SamplingParams, StartError
from moestro.engine.model.meta_model import build_meta_model
from moestro.engine.weights.checkpoint import Checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.build("mixtral", tmp_path / "model")


def refused(folder: Path, tmp_path: Path, kind: type[StartError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught, opened(folder, tmp_path / "cache"):
        pass
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/**/*.p*")), "a refused model left files behind"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def html(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html>not found</html>")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def own_code(folder: Path) -> None:
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "modeling_evil.Evil"})


def said_to_be_quantized(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "fp8"})


def wrong_width(folder: Path) -> None:
    edit_config(folder, hidden_size=32)


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_type(folder: Path) -> None:
    edit_config(folder, model_type="nothing_known")


def lost_shard(folder: Path) -> None:
    weight_map = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lost_dense(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    edit_tensors(folder, change)


def lost_experts(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".1.block_sparse_moe.experts" in key]:
            del tensors[key]

    edit_tensors(folder, change)


def one_expert_lost(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]

    edit_tensors(folder, change)


def several_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    (folder / "old.safetensors").write_bytes(path.read_bytes())
    path.rename(folder / "new.safetensors")


def key_in_two_shards(folder: Path) -> None:
    path = folder / "model.safetensors"
    keys = list(load_file(path))
    names = ("a.safetensors", "b.safetensors")
    for name in names:
        (folder / name).write_bytes(path.read_bytes())
    weight_map = {key: names[number % 2] for number, key in enumerate(keys)}
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def index_that_leaves_the_folder(folder: Path) -> None:
    write_index(folder, {"model.norm.weight": "../model.safetensors"})


def empty_index(folder: Path) -> None:
    write_index(folder, {})


def tensor_of_the_index_lost(folder: Path) -> None:
    write_index(folder, {"model.norm.scale": "model.safetensors"})


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def config_is_deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def config_is_bytes(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{")


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (truncate, ModelRefused, "model.safetensors is truncated: it has "),
        (html, ModelRefused, "model.safetensors is a web page"),
        (pickled, ModelRefused, "pytorch_model.bin, which can run code"),
        (no_weights, ModelNotFound, "no .safetensors files"),
        (own_code, ModelRefused, "auto_map"),
        (said_to_be_quantized, ModelRefused, "says fp8, and no tensor of the files is"),
        (wrong_width, ModelRefused, "in the file"),
        (broken_config, ModelRefused, "config.json"),
        (unknown_type, ModelRefused, "nothing_known"),
        (lost_shard, ModelRefused, "shard model-00002-of-00002.safetensors is missing"),
        (lost_dense, ModelRefused, "missing in the files: model.norm.weight"),
        (lost_experts, ModelRefused, "missing in the files: .*layers.1.mlp.experts"),
        (one_expert_lost, ModelRefused, r"missing in .*layers.1.*down_proj \(7 of 8 of .*w2"),
        (several_files, ModelRefused, "has new.safetensors, old.safetensors and no .*index.json"),
        (key_in_two_shards, ModelRefused, "is in a.safetensors and in b.safetensors"),
        (index_that_leaves_the_folder, ModelRefused, "'../model.safetensors' is not a file's"),
        (empty_index, ModelRefused, "names no tensors"),
        (tensor_of_the_index_lost, ModelRefused, "missing in its files: model.norm.scale"),
        (config_is_a_list, ModelRefused, "config.json is not a JSON object"),
        (config_is_deep, ModelRefused, "config.json"),
        (config_is_bytes, ModelRefused, "config.json"),
    ],
)
def test_refusals_name_the_file_and_the_reason(
    harm: Callable[[Path], None],
    kind: type[StartError],
    words: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    harm(folder)
    with pytest.raises(kind, match=words) as caught, opened(folder, tmp_path / "cache"):
        pass
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/**/*.partial")), "half a pack was left behind"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": -4}, "negative"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -64}, "negative"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"pad_token_id": 100_000}, "[Pp]ad"),
        ({"num_hidden_layers": [4]}, "num_hidden_layers"),
        ({"rope_parameters": "default"}, "rope"),
        ({"hidden_act": "no_such"}, "no_such"),
        ({"dtype": "float99"}, "float99"),
        ({"model_type": 3}, "`3`"),
        ({"model_type": None}, "`None`"),
        ({"layer_types": ["no", "such"]}, "layer_types"),
    ],
)
def test_configs_of_wrong_types_and_numbers_are_refused_in_one_line(
    changes: dict[str, object], words: str, folder: Path, tmp_path: Path
) -> None:
    edit_config(folder, **changes)
    refused(folder, tmp_path, ModelRefused, words)


def test_stray_files_are_not_read(folder: Path, tmp_path: Path) -> None:
    """A stale export beside the model must neither add to it nor win over it."""
    wanted = Checkpoint(folder).fingerprint()
    zeros = {key: torch.zeros_like(tensor) for key, tensor in load_model(folder).items()}
    save_file(zeros, folder / "zz_old.safetensors", {"format": "pt"})
    assert Checkpoint(folder).fingerprint() == wanted
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    write_index(folder, dict.fromkeys(zeros, "part.safetensors"))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    with opened(folder, tmp_path / "cache") as loaded:
        found = generate(loaded.engine, [[5, 6, 7]], params)[0].ids
    stock = tiny.oracle(tiny.build("mixtral", tmp_path / "same"))
    with torch.inference_mode():
        assert found[0] == int(stock(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())


def test_the_only_file_may_have_any_name(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with opened(folder, tmp_path / "cache"):
        pass


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_each_tensor_that_is_missing_is_named(family: str, tmp_path: Path) -> None:
    """One at a time, whatever the family's conversions do with it."""
    folder = tiny.build(family, tmp_path / "model")
    checkpoint = Checkpoint(folder)
    model = build_meta_model(checkpoint, torch.float32)
    checkpoint.split_keys(model)
    whole = dict(checkpoint._slices)
    for key in whole:
        checkpoint._slices = {other: found for other, found in whole.items() if other != key}
        with pytest.raises(ModelRefused, match="tensors are missing in the files: "):
            checkpoint.split_keys(model)


def test_tied_weights_may_be_there_once_under_either_name(tmp_path: Path) -> None:
    folder = tiny.build("granitemoeshared", tmp_path / "model")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(folder, rename)
    checkpoint = Checkpoint(folder)
    checkpoint.split_keys(build_meta_model(checkpoint, torch.float32))


@contextmanager
def somebody_else() -> Iterator[None]:
    """Root may read everything, so for a while it is not root."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if me == 0:
            os.seteuid(me)


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_what_may_not_be_read_is_said(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        shared = Path(shutil.copytree(folder, Path(open_to_all) / "model"))
        for path in (shared, *shared.iterdir()):
            path.chmod(0o755)
        (shared / name).chmod(0)
        try:
            with somebody_else(), pytest.raises(ModelRefused) as caught:
                Checkpoint(shared)
        finally:
            (shared / name).chmod(0o755)
    assert str(caught.value) == f"cannot read {shared / name}: Permission denied"


def test_a_name_that_is_too_long_is_refused_in_one_line() -> None:
    with pytest.raises(ModelRefused, match="cannot read .*File name too long"):
        Checkpoint(Path("/tmp") / ("x" * 5000))


def test_a_missing_folder_and_a_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, ModelNotFound, "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, ModelNotFound, "no config.json")


def test_a_dense_model_is_pointed_to_factorize(tmp_path: Path) -> None:
    folder = tiny.save(hf.LlamaConfig(**tiny.WIDTHS), tmp_path / "model")
    refused(folder, tmp_path, ModelRefused, "moestro factorize")


def test_a_sharded_checkpoint_loads(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    sharded = tmp_path / "sharded"
    hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="300KB")
    tiny.write_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    params = SamplingParams(max_tokens=8, temperature=0.0)
    found = []
    for place in (folder, sharded):
        with opened(place, tmp_path / "cache") as loaded:
            found.append(generate(loaded.engine, [[5, 6, 7]], params)[0].ids)
    assert found[0] == found[1]


def test_a_changed_model_gets_a_new_pack(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    params = SamplingParams(max_tokens=8, temperature=0.0)
    with opened(folder, tmp_path / "cache") as loaded:
        first = generate(loaded.engine, [[5, 6, 7]], params)[0].ids

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if ".experts." in key:
                tensor.mul_(-2)

    edit_tensors(folder, scale)
    with opened(folder, tmp_path / "cache") as loaded:
        second = generate(loaded.engine, [[5, 6, 7]], params)[0].ids
    assert first != second
    assert len(list((tmp_path / "cache").glob("packs/*/*.pack"))) == 1


def test_the_experts_budget_must_hold_one_tokens_experts(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    words = "--host-memory: .*smallest value that works is 96"
    with (
        pytest.raises(StartError, match=words),
        opened(folder, tmp_path / "cache", host_memory_bytes=60_000),
    ):
        pass
    with opened(folder, tmp_path / "cache", host_memory_bytes=2 * 48 * 1024) as loaded:
        assert loaded.cache.plan.slots == 2


def test_context_and_choices_are_checked(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    for settings, words in (
        ({"max_model_len_tokens": 513}, "the model's own limit is 512"),
        ({"max_model_len_tokens": 512, "kv_memory_bytes": 99_000}, "lower --max-model-len to 96"),
        ({"device": "tpu"}, "--device tpu"),
        ({"expert_format": "int3"}, "--expert-format int3"),
        ({"experts_per_token": 9}, "--experts-per-token 9"),
    ):
        with pytest.raises(StartError, match=words), opened(folder, tmp_path / "c", **settings):
            pass
    with opened(folder, tmp_path / "cache", kv_memory_bytes=64 * 1024) as loaded:
        assert loaded.info.max_model_len_tokens == 64


def test_more_experts_per_token_can_be_asked_for(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with opened(folder, tmp_path / "cache", experts_per_token=3) as loaded:
        assert loaded.info.experts_per_token == 3


def test_an_expert_in_a_wider_dtype_widens_its_layer(tmp_path: Path) -> None:
    """As transformers does, whatever the file's order: no bit of the wide one is lost."""
    folder = tiny.build("mixtral", tmp_path / "model", torch.bfloat16)
    key = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key.format(3)] = tensors[key.format(3)].float() + 1e-4
        tensors[key.format(5)] = tensors[key.format(5)].half()

    edit_tensors(folder, widen)
    prompt = list(range(20, 40))
    wanted = tiny.oracle(folder)(torch.tensor([prompt])).logits[0, -1].detach()
    for expert_format, most in (("native", 1e-5), ("int8", 0.2)):
        with opened(folder, tmp_path / "cache", expert_format=expert_format) as loaded:
            found = run_logits(loaded, [[(1, prompt)]])[0]
            assert (found - wanted).norm() < most * wanted.norm(), expert_format
    checkpoint = Checkpoint(folder)
    tensors = checkpoint.split_keys(build_meta_model(checkpoint, torch.float32))[0][1].tensors
    assert (tensors["down_proj"][0], tensors["gate_up_proj"][0]) == (torch.float32, torch.bfloat16)
