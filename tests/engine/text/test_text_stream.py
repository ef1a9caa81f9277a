"""What streams is what the whole answer says, whatever the tokenizer, the bytes and the stops."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny_tokenizers
from moestro.engine import Tokenizer
from moestro.engine.text.reader import MOST_CHARACTER_BYTES, ByteReader, WindowReader
from moestro.engine.text.vocabulary import Vocabulary
from tiny_tokenizers import BY_BYTES, CALL, EOS, opened

KINDS = st.sampled_from(sorted(tiny_tokenizers.ALL)).map(opened)
JOINING = st.sampled_from(sorted(BY_BYTES)).map(opened)
SIZE = 280  # above every id, so that a few are holes
IDS = st.lists(
    st.one_of(
        st.integers(0, SIZE),
        st.sampled_from(["😀", "é", "a b", "  ", "\ufffd", EOS, CALL, "ab" + EOS + "a"]),
    ),
    max_size=25,
)
STOPS = st.lists(
    st.one_of(
        st.text("ab é\ufffd", min_size=1, max_size=4),
        st.sampled_from([EOS, f"b{EOS}a", EOS[:-2], CALL, "😀", f"{EOS}{EOS}", "|", ">"]),
    ),
    max_size=3,
).map(tuple)


def ids_of(tokenizer: Tokenizer, given_ids: list[int | str]) -> list[int]:
    found: list[int] = []
    for one in given_ids:
        found += [one] if isinstance(one, int) else tokenizer.encode(one, add_special_tokens=False)
    return found


def said(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], stop: tuple[str, ...] = (), **how: bool
) -> tuple[str, list[str], bool]:
    """The text let out, every token's own text, and whether a stop string came."""
    stream = tokenizer.stream(prompt, stop, **how)
    text, own = "", list[str]()
    for token in ids:
        piece = stream.push(token)
        text += piece.text
        own.append(piece.token_text)
        assert "".join(own).startswith(text)
        if stream.stopped:
            assert stream.finish() == "" and stream.push(token).text == ""
            return text, own, True
    return text + stream.finish(), own, False


@given(tokenizer=KINDS, asked=IDS, prompt=IDS, shown=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_stream_is_the_whole(
    tokenizer: Tokenizer, asked: list[int | str], prompt: list[int | str], shown: bool
) -> None:
    ids, before = ids_of(tokenizer, asked), ids_of(tokenizer, prompt)
    text, own, _ = said(tokenizer, [], ids, skip_special_tokens=not shown)
    assert text == tokenizer.decode(ids, skip_special_tokens=not shown)
    assert own == tokenizer.texts(ids, skip_special_tokens=not shown)
    assert "".join(own) == text
    after = said(tokenizer, before, ids, skip_special_tokens=not shown)[0]
    whole, start = (
        tokenizer.decode(one, skip_special_tokens=not shown) for one in (before + ids, before)
    )
    rest = whole.removeprefix(start)
    # a character that the prompt begins and the answer does not go on with is not the answer's
    assert after == rest or "\ufffd" + after == rest


@given(tokenizer=KINDS, asked=IDS, stop=STOPS, shown=st.booleans(), kept=st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_first_complete_stop_string_ends_the_text(
    tokenizer: Tokenizer,
    asked: list[int | str],
    stop: tuple[str, ...],
    shown: bool,
    kept: bool,
) -> None:
    ids = ids_of(tokenizer, asked)
    hidden = frozenset() if shown else tokenizer._vocabulary.special_ids
    # all characters of the answer, each with whether it is shown
    marked = [
        (char, part.shown)
        for parts in [*map(reader_of(tokenizer, hidden).push, ids)]
        for part in parts
        for char in part.text
    ]
    everything = "".join(char for char, _ in marked)
    ends = sorted((everything.find(one) + len(one), -len(one)) for one in stop if one in everything)
    text, _, stopped = said(
        tokenizer, [], ids, stop, include_stop=kept, skip_special_tokens=not shown
    )
    assert stopped == bool(ends)
    cut = (ends[0][0] if kept else sum(ends[0])) if ends else len(marked)
    assert text == "".join(char for char, is_shown in marked[:cut] if is_shown)


def reader_of(tokenizer: Tokenizer, hidden: frozenset[int]) -> ByteReader | WindowReader:
    kind = ByteReader if tokenizer._vocabulary.joins_bytes else WindowReader
    return kind(tokenizer._vocabulary, (), bool(hidden))


@given(data=st.binary(max_size=40), kind=st.sampled_from(["byte_level", "spaces_kept"]))
@example(data=b"\xed\xa0", kind="byte_level")  # a surrogate's start
@example(data=b"\xf4\x90\xe0\x80\xf0\x9f\x98a\xc0", kind="spaces_kept")
@settings(max_examples=200, deadline=None)
def test_any_bytes_come_out_as_soon_as_they_are_known(data: bytes, kind: str) -> None:
    tokenizer = opened(kind)
    of_byte = {tokenizer.token_bytes(token): token for token in range(256)}
    stream = tokenizer.stream([], ())
    text = ""
    for count, byte in enumerate(data, 1):
        text += stream.push(of_byte[bytes([byte])]).text
        unsure = data[:count].decode("utf-8", "replace").removeprefix(text)
        assert unsure in ("", "\ufffd"), "more than half a character is held"
        if unsure:
            tail = data[max(0, count - MOST_CHARACTER_BYTES + 1) : count]
            assert any(could_become(tail[start:]) for start in range(len(tail)))
    whole = data.decode("utf-8", "replace")
    assert text + stream.finish() == (whole[:-1] if text != whole else whole)


def could_become(start: bytes) -> bool:
    """Whether some bytes make it a character: tried, not known from a table."""
    edges = [b"\x80", b"\x8f", b"\x90", b"\x9f", b"\xa0", b"\xbf"]
    for more in range(1, MOST_CHARACTER_BYTES):
        for edge in edges:
            try:
                if len((start + edge + b"\x80" * (more - 1)).decode("utf-8")) == 1:
                    return True
            except UnicodeDecodeError:
                continue
    return False


@given(text=st.text("ab é😀", max_size=20), prompt=st.text("ab é😀", max_size=8), kind=JOINING)
@settings(max_examples=100, deadline=None)
def test_bytes_and_windows_say_the_same(text: str, prompt: str, kind: Tokenizer) -> None:
    """But for U+FFFD: a window cannot tell a written one from half a character."""
    ids, before = kind.encode(text), kind.encode(prompt)
    by_bytes = ByteReader(kind._vocabulary, before, True)
    by_windows = WindowReader(kind._vocabulary, before, True)
    said_by = [
        "".join(part.text for token in ids[1:] for part in reading.push(token)) + reading.close()
        for reading in (by_bytes, by_windows)
    ]
    assert said_by[0] == said_by[1]


@given(tokenizer=KINDS, text=st.text("ab é😀\ufffd.", max_size=20))
@settings(deadline=None)
def test_whole_text_is_what_the_library_says(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer._fast.decode(
            ids, skip_special_tokens=skip
        )


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "spaces_kept", "metaspace"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_may_end_inside_a_character(kind: str, cut: int) -> None:
    tokenizer = opened(kind)
    eos = tokenizer.encode(EOS, add_special_tokens=False)
    of_byte = {tokenizer.token_bytes(token): token for token in reversed(range(256))}
    bits = [of_byte[bytes([byte])] for byte in "😀".encode()]
    start = [*tokenizer.encode("ab"), *bits[:cut]]
    text, own, _ = said(tokenizer, start, [*bits[cut:], of_byte[b"!"]])
    assert (text, own) == ("😀!", [*[""] * (3 - cut), "😀", "!"])
    assert said(tokenizer, start, [of_byte[b"!"]])[0] == "!", "the prompt's half is not echoed"
    assert said(tokenizer, start, [*eos, of_byte[b"!"]])[0] == "!"


@pytest.mark.parametrize("kind", sorted(BY_BYTES))
@pytest.mark.parametrize("text", ["a\ufffdb", "ab\ufffd", "\ufffd" * 20, "\ufffd"])
def test_a_replacement_character_that_was_written_comes_through(kind: str, text: str) -> None:
    tokenizer = opened(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert said(tokenizer, [], ids)[0] == text
    assert said(tokenizer, tokenizer.encode("ab"), ids)[0].strip(" ") == text
    last = said(tokenizer, [], ids[:-1])[0]
    assert last == text[:-1], "what remains of half a character is nothing"


def test_half_a_character_before_a_special_token_is_broken_at_once() -> None:
    tokenizer = opened("byte_level")
    half, (eos,) = tokenizer.encode("😀")[1:-1], tokenizer.encode(EOS, add_special_tokens=False)
    assert said(tokenizer, [], [*half, eos, eos])[1] == [*[""] * len(half), "\ufffd", ""]
    assert tokenizer.decode([*half, eos]) == "\ufffd"
    shown = said(tokenizer, [], [*half, eos], ("\ufffd",), skip_special_tokens=False)
    assert (shown[0], shown[2]) == ("", True), "the token that breaks it is after the stop"
    assert tokenizer.decode(half) == ""


@pytest.mark.parametrize("kind", sorted(tiny_tokenizers.ALL))
@pytest.mark.parametrize(
    ("stop", "rest"),
    [(EOS, "A"), (EOS[2:8], "A"), (f"A{EOS}", ""), (f"{EOS}A", "A"), (f"A{EOS}A", "")],
)
def test_a_special_tokens_text_stops(kind: str, stop: str, rest: str) -> None:
    tokenizer = opened(kind)
    a, eos = tokenizer._fast.encode(f"a{EOS}", add_special_tokens=False).ids[-2:]
    word = said(tokenizer, [a], [a])[0]  # some decoders put a space before each
    ids = [a, eos, a]
    assert said(tokenizer, [a], ids)[0] == word * 2
    text, _, stopped = said(tokenizer, [a], ids, (stop.replace("A", word),))
    assert (text, stopped) == (rest.replace("A", word), True)


def test_a_stop_string_is_kept_where_it_is_asked_for() -> None:
    tokenizer = opened("byte_level")
    ids = tokenizer.encode(f"ab{EOS}ab")
    assert said(tokenizer, [], ids, ("b",), include_stop=True)[0] == "ab"
    shown = said(tokenizer, [], ids, (f"{EOS}a",), include_stop=True, skip_special_tokens=False)
    assert shown[0] == f"<s>ab{EOS}a"
    assert said(tokenizer, [], ids, (f"{EOS}a",), include_stop=True)[0] == "aba"


class Counting(Vocabulary):
    """Counts what is asked of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer._fast)
        self.asked_tokens = 0

    def bytes_of(self, token_id: int) -> bytes:
        self.asked_tokens += 1
        return super().bytes_of(token_id)

    def window(self, ids: object) -> str:
        assert isinstance(ids, list)
        self.asked_tokens += len(ids)
        return super().window(ids)


@pytest.mark.parametrize("kind", ["byte_level", "wordpiece"])
def test_a_long_answer_costs_no_more_per_token(kind: str) -> None:
    tokenizer = opened(kind)
    tokenizer_counts = Counting(tokenizer)
    reading = (ByteReader if kind in BY_BYTES else WindowReader)(tokenizer_counts, [1] * 500, True)
    costs = []
    for _ in range(300):
        before = tokenizer_counts.asked_tokens
        reading.push(1)
        costs.append(tokenizer_counts.asked_tokens - before)
    assert max(costs[100:]) <= max(costs[:100]) <= 20
