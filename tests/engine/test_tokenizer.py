"""Text comes out whole, or not at all."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        piece = stream.push(token)
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
