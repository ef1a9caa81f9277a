"""Text comes out whole, or not at all."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

import tiny
import tiny_tokenizers
from moestro.engine import BadParameter, ModelRefused, PromptTooLong, Tokenizer
from tiny_tokenizers import ALL, BOS, CALL, EOS, opened

TEXTS = st.lists(
    st.one_of(st.text(max_size=4), st.sampled_from(["ab", "  ", "😀", "e\u0301", BOS, EOS, CALL])),
    max_size=8,
).map("".join)


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
        out += piece
        if stream.stopped:
            return out, True
    return out + stream.finish(), False


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_stream_is_the_text(tokenizer: Tokenizer, text: str) -> None:
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


@given(text=TEXTS, kind=st.sampled_from(sorted(ALL)).map(opened), special=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_token_of_a_prompt_has_its_slice(text: str, kind: Tokenizer, special: bool) -> None:
    ids, texts = kind.encode_with_texts(text, add_special_tokens=special)
    assert ids == kind.encode(text, add_special_tokens=special)
    assert len(texts) == len(ids) and "".join(texts) == (text if ids else "")


@given(text=TEXTS, kind=st.sampled_from(["byte_level", "spaces_kept"]).map(opened))
@settings(deadline=None)
def test_a_prompts_slices_are_a_streams_texts(text: str, kind: Tokenizer) -> None:
    ids, texts = kind.encode_with_texts(text)
    assert texts[1:] == kind.texts(ids, skip_special_tokens=False)[1:]
    assert texts[0] == "" or text.startswith(BOS)


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    ids, texts = opened("byte_level").encode_with_texts("é😀é!")
    assert len(ids) == 8 and texts == ["", "", "é", "", "😀", "", "é", "!"]
    assert opened("byte_level").texts(ids) == texts


def test_what_a_normalizer_drops_is_in_a_slice(tmp_path: Path) -> None:
    fast = tiny_tokenizers.byte_level()
    fast.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    tokenizer = tiny_tokenizers.open_fast(fast, tmp_path)
    ids, texts = tokenizer.encode_with_texts("  a e\u0301  ")
    assert [tokenizer.token_text(token) for token in ids[:3]] == [BOS, "a", " "]
    assert texts == ["", "  a", " ", "", "e\u0301  "]
    assert tokenizer.encode_with_texts("   ") == ([ids[0]], ["   "])
    assert tokenizer.encode_with_texts("   ", add_special_tokens=False) == ([], [])


@pytest.mark.parametrize("kind", sorted(ALL))
def test_bos_comes_once(kind: str) -> None:
    tokenizer = opened(kind)
    bos = tokenizer._fast.token_to_id(BOS)
    assert bos is not None
    plain = tokenizer.encode("ab")
    assert plain[0] == bos and bos not in plain[1:]
    for text in (f"{BOS}ab", f"{BOS}", f"{BOS}{BOS}ab"):
        own = tokenizer.encode(text, add_special_tokens=False)
        assert own.count(bos) == text.count(BOS)
        assert tokenizer.encode(text) == own
        assert tokenizer.encode_with_texts(text)[1][0] == BOS
    assert tokenizer.encode("ab", add_special_tokens=False).count(bos) == 0
    assert tokenizer.encode("") == [bos] and tokenizer.encode("", add_special_tokens=False) == []


def test_a_start_of_several_tokens_comes_once(tmp_path: Path) -> None:
    fast = tiny_tokenizers.byte_level()
    bos, eos = (fast.token_to_id(one) for one in (BOS, EOS))
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BOS} {EOS} $A {EOS}", special_tokens=[(BOS, bos), (EOS, eos)]
    )
    tokenizer = tiny_tokenizers.open_fast(fast, tmp_path)
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode(f"{BOS}{EOS}a") == [bos, eos, a, eos] == tokenizer.encode("a")
    assert tokenizer.encode_with_texts(f"{BOS}{EOS}a")[1] == [BOS, EOS, "a", ""]
    assert tokenizer.encode(f"{BOS}a") == [bos, eos, bos, a, eos]


def test_a_second_bos_is_not_counted() -> None:
    tokenizer = opened("byte_level")
    assert len(tokenizer.encode(f"{BOS}b", 2)) == 2
    for encode in (tokenizer.encode, tokenizer.encode_with_texts):
        with pytest.raises(PromptTooLong, match="has 3 tokens"):
            encode(f"{BOS}bb", 2)
        with pytest.raises(BadParameter, match="not valid Unicode"):
            encode("\udfff")


@pytest.mark.parametrize(
    ("kind", "piece", "data", "text"),
    [
        ("byte_level", "ðŁ", b"\xf0\x9f", "bytes:\\xf0\\x9f"),
        ("byte_level", "Ġ", b" ", " "),
        ("byte_level", EOS, EOS.encode(), EOS),
        ("byte_level", CALL, CALL.encode(), CALL),
        ("sentencepiece", "<0xE2>", b"\xe2", "bytes:\\xe2"),
        ("sentencepiece", "▁ab", b" ab", " ab"),
        ("sentencepiece", "<0x0A>", b"\n", "\n"),
        ("metaspace", "▁▁", b"  ", "  "),
        ("wordpiece", "##ing", b"ing", "ing"),
        ("wordpiece", "the", b" the", " the"),
        ("wordpiece", EOS, EOS.encode(), EOS),
    ],
)
def test_what_one_token_stands_for(kind: str, piece: str, data: bytes, text: str) -> None:
    tokenizer = opened(kind)
    token = tokenizer._fast.token_to_id(piece)
    assert token is not None
    assert (tokenizer.token_bytes(token), tokenizer.token_text(token)) == (data, text)


@pytest.mark.parametrize("kind", sorted(ALL))
def test_an_id_without_a_token_is_nothing(kind: str) -> None:
    tokenizer = opened(kind)
    for hole in (5000, 2**32, 2**70, -1):
        assert tokenizer.token_bytes(hole) == b"" and tokenizer.token_text(hole) == ""
        assert tokenizer.texts([hole, 1, hole]) == ["", tokenizer.texts([1])[0], ""]


@given(text=TEXTS)
@settings(deadline=None)
def test_byte_pieces_are_the_prompts_bytes(text: str) -> None:
    tokenizer = opened("byte_level")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()


def test_an_added_token_is_text_and_not_bytes_spelled_in_letters(tmp_path: Path) -> None:
    fast = tiny_tokenizers.byte_level()
    fast.add_tokens(["née"])
    fast.add_special_tokens(["<é>"])
    tokenizer = tiny_tokenizers.open_fast(fast, tmp_path)
    ids = tokenizer.encode("née<é>", add_special_tokens=False)
    assert len(ids) == 2 and tokenizer.decode(ids, skip_special_tokens=False) == "née<é>"


def test_only_the_first_token_loses_its_space() -> None:
    for kind, said in (
        ("sentencepiece", "ab ab"),
        ("metaspace", "ab ab"),
        ("spaces_kept", " ab ab"),
    ):
        tokenizer = opened(kind)
        bos, ab = (tokenizer._fast.token_to_id(one) for one in (BOS, "▁ab"))
        assert bos is not None and ab is not None
        assert tokenizer.decode([bos, ab, ab]) == said
        after = tokenizer.stream([bos, ab], ())
        assert after.push(ab).text == " ab"
        first = tokenizer.stream([bos], ())
        assert first.push(ab).text == said[: -len(" ab")]


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
