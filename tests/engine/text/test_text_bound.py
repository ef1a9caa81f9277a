"""A text that is too long is told by its length, and only where that is sure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

import tiny
from moestro.engine import PromptTooLong, Tokenizer
from moestro.engine.text.text_bound import most_chars_per_token

WORDS = {"a": 0, "b": 1, "ab": 2, "abab": 3, "<unk>": 4}
MERGES = [("a", "b"), ("ab", "ab")]


def bpe(**options: object) -> FastTokenizer:
    return FastTokenizer(models.BPE(vocab=WORDS, merges=MERGES, **options))


def test_the_longest_token_is_the_bound() -> None:
    assert most_chars_per_token(bpe()) == len("<unk>")
    longer = bpe(unk_token="<unk>")
    longer.add_tokens(["x" * 40])
    assert most_chars_per_token(longer) == 40


@given(text=st.text("ab xé", max_size=60))
def test_no_text_has_fewer_tokens(text: str) -> None:
    fast = bpe(unk_token="<unk>")
    most = most_chars_per_token(fast)
    assert most is not None
    assert len(fast.encode(text)) * most >= len(text)


def test_composed_characters_are_counted_apart() -> None:
    fast = bpe()
    fast.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_")])
    assert most_chars_per_token(fast) == 4 * len("<unk>")


def test_a_tokenizer_that_may_drop_text_has_no_bound() -> None:
    words = FastTokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    assert most_chars_per_token(words) is None
    assert most_chars_per_token(bpe(unk_token="<unk>", fuse_unk=True)) is None
    stripped, collapsed, removed = bpe(), bpe(), bpe()
    stripped.normalizer = normalizers.Strip()
    collapsed.normalizer = normalizers.Replace("  ", " ")
    removed.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    before, after = bpe(), bpe()
    before.add_special_tokens([AddedToken("<end>", lstrip=True)])
    after.add_tokens([AddedToken("<end>", rstrip=True)])
    for fast in (stripped, collapsed, removed, before, after):
        assert most_chars_per_token(fast) is None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bound")
    tiny.write_tokenizer(folder)
    return Tokenizer(folder)


class Untouched:
    """Stands for the library where it must not be asked."""


def test_a_text_far_too_long_is_refused_before_it_is_encoded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PromptTooLong, match="length is 4 tokens.*has 5 tokens"):
        tokenizer.encode("x" * 5, 4)
    assert len(tokenizer.encode("x" * 4, 4)) == 4
    monkeypatch.setattr(tokenizer, "_fast", Untouched())
    with pytest.raises(PromptTooLong, match="length is 4 tokens.*at least 1000"):
        tokenizer.encode("x" * 1000 * (tokenizer._chars_per_token or 0), 4)
