"""What is no GGUF model that can be served: one line that names the file and the cause."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_models import fields, write_gguf
from moestro.engine import EngineConfig
from moestro.engine.facts import ModelRefused, StartError
from moestro.engine.planning import inspect
from moestro.engine.text import Tokenizer
from tiny_gguf import write_tiny_gguf

Harm = Callable[[bytes], bytes]


def refusal(path: Path) -> str:
    with pytest.raises(StartError) as refused:
        inspect(EngineConfig(path, path.parent / "cache"))
    words = str(refused.value)
    assert "\n" not in words and str(path if path.is_dir() else path.parent) in words
    return words


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def cut(length: int) -> Harm:
    return lambda data: data[:length]


def kind_of(name: bytes, number: int) -> Harm:
    """The type of a matrix in the table of tensors."""

    def harm(data: bytes) -> bytes:
        place = data.index(name) + len(name) + 4 + 2 * 8
        return data[:place] + struct.pack("<I", number) + data[place + 4 :]

    return harm


def swap(old: bytes, new: bytes) -> Harm:
    return lambda data: data.replace(old, new)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut(0), "is empty"),
        (cut(3), "does not begin with GGUF"),
        (cut(10), "ends, after 10 bytes, inside the number of tensors"),
        (cut(3000), "ends, after 3000 bytes, inside tokenizer.ggml.tokens"),
        (cut(-40_000), r"is cut off: it has \d+ bytes, and tensor blk.1.\S+ ends at \d+"),
        (lambda data: b"X" + data[1:], "does not begin with GGUF"),
        (lambda data: b"<!doctype html>" * 9, "is a web page"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "of version 9 of GGUF"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "is cut off or damaged"),
        (lambda data: data[:24] + b"\xff" * 8 + data[32:], "inside a field's name"),
        (kind_of(b"blk.0.attn_q.weight", 99), "tensor blk.0.attn_q.weight is of .* number 99"),
        (kind_of(b"blk.0.attn_q.weight", 27), "tensor blk.0.attn_q.weight is of .* type I64"),
        (kind_of(b"blk.0.attn_q.weight", 14), "is no whole number of blocks of 256"),
        (swap(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "two tensors blk.0.attn_k.weight"),
        (swap(b"qwen3moe", b"qwen9moe"), "is 'qwen9moe', which .* minimax-m2, qwen2moe, qwen35moe"),
        (swap(b"general.architecture", b"general.architectur_"), "general.architecture is missing"),
        (swap(b"ffn_down_exps", b"ffn_down_axps"), "tensors are missing in the files: .*down_proj"),
        (swap(b"1.attn_q.weight", b"1.attn_z.weight"), "missing in the files: .*1.self_attn.q_pr"),
        (swap(b"ffn_down_exps", b"ffn_diwn_exps"), "does not read the experts .blk.0.ffn_diwn_exp"),
    ],
)
def test_a_damaged_file_is_refused_in_a_line(
    harm: Harm, words: str, whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(harm(whole))
    assert re.search(words, refusal(path))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"tokenizer.ggml.model", b"tokenizer.ggml.mobel", "stating tokenizer None"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", "'tokens'"),
        (b"he ll", b"he lz", "Error while initializing BPE.*out of vocabulary"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(
    old: bytes, new: bytes, words: str, whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(ModelRefused, match=f"has no tokenizer that can be read: .*{words}"):
        Tokenizer(path)


@pytest.mark.parametrize("key", ["expert_used_count", "block_count", "attention.head_count"])
def test_a_field_that_is_missing(key: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", others={key: None})
    assert f"the field qwen3moe.{key} is missing" in refusal(path)


@pytest.mark.parametrize("key", ["embedding_length", "expert_count", "attention.head_count_kv"])
def test_a_field_that_is_wrong(key: str, tmp_path: Path) -> None:
    doubled = 2 * fields("qwen3moe", 64, 32)[key]
    path = write_gguf(tmp_path / "model.gguf", others={key: doubled})
    assert re.search(r"tensor \S+ is \(.*\), and model\.\S+ \(.*\) by the file's", refusal(path))


def test_experts_that_transformers_does_not_read(tmp_path: Path) -> None:
    words = refusal(write_gguf(tmp_path / "mixtral.gguf", "llama"))
    assert "is 'llama', of which transformers" in words and "blk.0.ffn_down_exps.weight" in words


def test_a_dense_model(tmp_path: Path) -> None:
    assert "no experts that moestro can offload" in refusal(write_tiny_gguf(tmp_path / "d.gguf"))


def test_a_folder_of_several(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        write_gguf(tmp_path / name)
    words = refusal(tmp_path)
    assert "has 2 GGUF models (a.gguf, b.gguf); name one" in words and "a.gguf`" in words


def test_parts_that_are_not_one_model(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", parts=3)
    second, third = (tmp_path / f"m-0000{n}-of-00003.gguf" for n in (2, 3))
    kept = second.read_bytes()
    second.unlink()
    for path in (first, tmp_path, third):
        assert "m-00002-of-00003.gguf of the 3 parts of m is missing" in refusal(path)
    second.write_bytes(third.read_bytes())
    assert "split.no 2, and its name says part 2 of 3" in refusal(first)
    second.write_bytes(kept)
    inspect(EngineConfig(first, tmp_path / "cache"))
    first.rename(tmp_path / "m.gguf")
    assert "split.count is 3" in refusal(tmp_path / "m.gguf")
