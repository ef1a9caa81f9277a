"""Text comes out whole, or not at all."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

import tiny
from moestro.engine import BadParameter, ModelRefused, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return Tokenizer(folder)


def spoken(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    stream = tokenizer.stream(tokenizer.encode("Before. "), stop)
    out = ""
    for token in tokenizer.encode(text):
        piece = stream.push(token).text
        assert "\ufffd" not in piece, "half a character was let out"
        out += piece
        if stream.stopped:
            return out, True
    return out + stream.finish(), False


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_stream_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    if "\ufffd" not in text:
        assert spoken(tokenizer, text) == (text, False)


@given(
    text=st.text("abcé", max_size=30),
    stop=st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_never_leaks(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    places = [text.find(one) for one in stop if one in text]
    out, stopped = spoken(tokenizer, text, tuple(stop))
    assert stopped == bool(places)
    # the first stop string to be complete ends the text; one that begins earlier but ends later
    # may be cut by it, so compare with the first that is complete
    ends = sorted((text.find(one) + len(one), text.find(one)) for one in stop if one in text)
    assert not any(one in out for one in stop)
    assert out == (text[: min(start for end, start in ends if end == ends[0][0])] if ends else text)


def test_special_tokens_are_silent_and_stop(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_ids == {256}
    assert tokenizer.decode([*tokenizer.encode("hi"), 256]) == "hi"


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadParameter, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="no tokenizer"):
        Tokenizer(tmp_path)


def byte_fallback(folder: Path) -> Tokenizer:
    """The kind of Llama-2 and Mixtral: pieces with a mark for the space, bytes as `<0xNN>`."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "▁world": 257, "a": 258}
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=fast)
    wrapped.save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_fallback(tmp_path_factory.mktemp("fallback"))


@given(ids=st.lists(st.integers(0, 258), max_size=30), prompt=st.lists(st.integers(0, 258)))
def test_no_sequence_of_bytes_can_raise(
    fallback: Tokenizer, ids: list[int], prompt: list[int]
) -> None:
    tokenizer = fallback
    stream = tokenizer.stream(prompt, ())
    for token in ids:
        stream.push(token)
    stream.finish()


def test_bytes_of_a_character_come_out_together(tmp_path: Path) -> None:
    tokenizer = byte_fallback(tmp_path)
    stream = tokenizer.stream([258, 0x0A], ())
    pieces = [stream.push(token).text for token in [0x0A, *"é😀".encode(), 257]]
    assert pieces == ["\n", "", "é", "", "", "", "😀", " world"]
    assert stream.finish() == ""


def test_the_prompt_is_never_echoed(tokenizer: Tokenizer) -> None:
    for prompt in ("secret text \ufffd", "naïve"):
        ids = tokenizer.encode(prompt)
        for cut in (ids, ids[:-1], ids[:3]):
            stream = tokenizer.stream(cut, ())
            out = "".join(stream.push(token).text for token in tokenizer.encode("xyz"))
            assert out + stream.finish() == "xyz"


def test_stored_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(8)
    stored.enable_padding(length=32)
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert len(tokenizer.encode("x" * 50)) == 50
    assert len(tokenizer.encode("hello")) == 5


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, {256}),
        ({"config.json": {"eos_token_id": 7}}, {256, 7}),
        ({"config.json": {"text_config": {"eos_token_id": [7, 8]}}}, {256, 7, 8}),
        (
            {"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": 9}},
            {256, 9},
        ),
    ],
)
def test_stop_ids_come_from_where_stock_takes_them(
    files: dict[str, object], wanted: set[int], tmp_path: Path
) -> None:
    tiny.write_tokenizer(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer(tmp_path).stop_ids == wanted


def test_an_end_of_sequence_that_is_no_id_is_refused(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "256"}')
    with pytest.raises(ModelRefused, match="eos_token_id must be a token id"):
        Tokenizer(tmp_path)
