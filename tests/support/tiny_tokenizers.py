"""Small tokenizers of every kind of decoder, all over the 256 bytes or a few words."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers as hf
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moestro.engine import Tokenizer

BOS, EOS, CALL = "<s>", "<|im_end|>", "<call>"  # CALL is added, not special


def byte_level() -> FastTokenizer:
    """GPT-2's kind: every byte, two merges inside characters and one word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ð", "Ł"), ("ðŁ", "ĺ"), ("ĺ", "Ģ"), ("a", "b")]
    vocab = {piece: place for place, piece in enumerate(alphabet)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return _finished(fast)


def sentencepiece() -> FastTokenizer:
    """Llama-2's and Mixtral's kind: a mark for the space, bytes as `<0xNN>`."""
    fast = _with_bytes()
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finished(fast)


def spaces_kept() -> FastTokenizer:
    """Gemma's kind: as SentencePiece, and a space at the start stays."""
    fast = _with_bytes()
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(fast)


def metaspace() -> FastTokenizer:
    fast = _with_bytes()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    return _finished(fast)


def wordpiece() -> FastTokenizer:
    """BERT's kind: its decoder puts spaces between words."""
    words = ["[UNK]", "a", "##b", "ab", "the", "##ing", ".", "é", "\ufffd", "##\ufffd"]
    vocab = {word: place for place, word in enumerate(words)}
    fast = FastTokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    return _finished(fast)


def suffixed() -> FastTokenizer:
    """GPT-1's kind: the end of a word is spelled, the last word's is not decoded."""
    vocab = {piece: place for place, piece in enumerate(["a", "b", "a</w>", "b</w>", "é</w>"])}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.decoder = decoders.BPEDecoder()
    return _finished(fast)


BY_BYTES: dict[str, Callable[[], FastTokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "spaces_kept": spaces_kept,
    "metaspace": metaspace,
}
BY_WINDOWS: dict[str, Callable[[], FastTokenizer]] = {"wordpiece": wordpiece, "suffixed": suffixed}
ALL = BY_BYTES | BY_WINDOWS


@cache
def opened(kind: str) -> Tokenizer:
    """Of one of ALL, as from a model's folder."""
    with TemporaryDirectory() as folder:
        return open_fast(ALL[kind](), Path(folder))


def open_fast(fast: FastTokenizer, folder: Path) -> Tokenizer:
    wrapped = hf.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=fast, bos_token=BOS, eos_token=EOS
    )
    wrapped.save_pretrained(folder)
    return Tokenizer(folder)


def _with_bytes() -> FastTokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ["▁", "▁▁", "a", "b", "ab", "▁a", "▁ab", "é", "\ufffd"]:
        vocab[piece] = len(vocab)
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁", "▁")]
    return FastTokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))


def _finished(fast: FastTokenizer) -> FastTokenizer:
    fast.add_special_tokens([BOS, EOS])
    fast.add_tokens([CALL])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, fast.token_to_id(BOS))]
    )
    return fast
