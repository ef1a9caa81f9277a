"""Which files of a repository are fetched, decided by their names."""

import pytest

from moestro.server.hub.choice import (
    INDEX_NAME,
    NotServable,
    RepoFile,
    for_shapes,
    for_text,
    for_weights,
)


def listed(*names: str) -> list[RepoFile]:
    return [RepoFile(name, 10, "0" * 40) for name in names]


def names(files: list[RepoFile]) -> list[str]:
    return [file.name for file in files]


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
EVERYTHING = listed(
    *("README.md", "LICENSE", ".gitattributes", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"),
    *(INDEX_NAME, *SHARDS, "model.safetensors", "consolidated.safetensors", "params.json"),
    *("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.pth"),
    *("original/config.json", "original/tokenizer.model", "original/model.safetensors"),
    *("onnx/model.onnx", "onnx/config.json", "figures/a.png", "modeling_own.py", "m.Q4_K.gguf"),
    *("additional_chat_templates/tools.jinja", "additional_chat_templates/deep/no.jinja"),
)


def test_a_plan_needs_config_and_index() -> None:
    assert names(for_shapes(EVERYTHING)) == ["config.json", INDEX_NAME]


def test_text_needs_tokenizer_and_templates() -> None:
    assert names(for_text(EVERYTHING)) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "additional_chat_templates/tools.jinja",
    ]


def test_weights_are_those_of_the_index() -> None:
    assert names(for_weights(EVERYTHING, set(SHARDS))) == list(SHARDS)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (("model.safetensors", "consolidated.safetensors"), "model.safetensors"),
        (("other.safetensors", "original/model.safetensors"), "other.safetensors"),
        (("other.safetensors", "moestro_routers.safetensors"), "other.safetensors"),
    ],
)
def test_without_an_index_it_is_the_single_file(there: tuple[str, ...], chosen: str) -> None:
    assert names(for_weights(listed(*there), None)) == [chosen]


@pytest.mark.parametrize(
    ("there", "shards", "said"),
    [
        (("a.bin", "b.bin", "config.json"), None, "has 2 .bin, 1 .json"),
        (("moestro_routers.safetensors",), None, "no .safetensors files"),
        (("original/a.safetensors",), None, "no .safetensors files; it has 1 .safetensors"),
        ((), None, "no files"),
        (("a.safetensors", "b.safetensors"), None, "2 .safetensors files and no " + INDEX_NAME),
        ((SHARDS[0],), set(SHARDS), f"names {SHARDS[1]}, which it does not have"),
    ],
)
def test_what_cannot_be_served_says_what_is_there(
    there: tuple[str, ...], shards: set[str] | None, said: str
) -> None:
    with pytest.raises(NotServable) as refused:
        for_weights(listed(*there), shards)
    assert said in str(refused.value)


def test_a_repository_without_a_config_is_none_of_a_model() -> None:
    with pytest.raises(NotServable, match=r"no config\.json; it has 1 \.gguf"):
        for_shapes(listed("m.gguf"))
