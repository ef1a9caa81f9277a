"""Answers held to a grammar, by llguidance: compiled once, then followed token by token.

A grammar comes from outside, so everything about it has a bound: its length, llguidance's own
limits (of expressions, states, items), the time of its compilation, the grammars that are kept.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import Tokenizer as FastTokenizer

from moestro.engine.facts import GrammarRefused, GrammarSpec, QueueFull

from .endless import is_endless
from .grammar_tokens import GrammarTokens
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # a name of its stubs alone

Logits = np.ndarray[tuple[int], np.dtype[np.float32]]

# pretty or compact, but not for ever: a model may like white space so much that it never ends
WHITESPACE = r" ?(\n( {0,64}|\t{0,16}))?"
MOST_WORDS = 300
TRIED_TOKENS = 24  # of a new grammar
LIMITS = LLParserLimits(
    initial_lexer_fuel=150_000,  # 5000 values of an enum; a quarter second in a step
    max_lexer_states=30_000,  # of 1 to 2 kB each
    verbose_errors=False,  # nothing of the answer
)


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    most_bytes: int = 128 * 1024  # of one grammar's text
    compile_s: float = 5.0
    most_compiling: int = 4  # at once, those included that took too long and still run
    most_kept: int = 64
    most_kept_bytes: int = 1024 * 1024  # of their texts


class GrammarFault(Exception):
    """An answer's grammar cannot be followed any further; no other answer has anything to do with
    it."""


class Grammars:
    """The grammars of one tokenizer. Thread safe; `compile` may take seconds."""

    def __init__(
        self,
        fast: FastTokenizer,
        vocabulary: Vocabulary,
        stop_ids: frozenset[int],
        limits: GrammarLimits = GrammarLimits(),
    ) -> None:
        self._open: Callable[[], _Opened] = lambda: _opened(
            GrammarTokens(fast, vocabulary, stop_ids)
        )
        self._limits = limits
        self._gate = threading.Lock()  # guards the next
        self._kept: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self._opening = threading.Lock()
        self._tokens: _Opened | None = None
        self._places = threading.Semaphore(limits.most_compiling)

    def compile(self, spec: GrammarSpec) -> "CompiledGrammar":
        """The one that is kept, or a new one. The first call reads the vocabulary as well.

        A compilation that takes too long cannot be stopped: it goes on in a thread of its own, of
        which there are few. Raises GrammarRefused, and QueueFull while all of these are taken.
        """
        with self._gate:
            if (known := self._kept.get(spec)) is not None:
                self._kept.move_to_end(spec)
                return known
        if (size := _bytes_of(spec)) > self._limits.most_bytes:
            raise GrammarRefused(
                f"the grammar has {size} bytes; at most {self._limits.most_bytes} are taken"
            )
        vocabulary = self._opened()
        compiled = self._in_time(lambda: _compiled(vocabulary, spec))
        self._keep(spec, compiled)
        return compiled

    def _opened(self) -> "_Opened":
        with self._opening:
            if self._tokens is None:
                self._tokens = self._open()
            return self._tokens

    def _in_time(self, work: Callable[[], "CompiledGrammar"]) -> "CompiledGrammar":
        limit_s = self._limits.compile_s
        if not self._places.acquire(timeout=limit_s):
            raise QueueFull("other grammars are being compiled; try again later")
        done: Future[CompiledGrammar] = Future()
        threading.Thread(
            target=self._work, args=(work, done), name="moestro-grammar", daemon=True
        ).start()
        try:
            return done.result(limit_s)
        except TookTooLong as error:
            raise GrammarRefused(
                f"the grammar took more than {limit_s:g} s to compile; make it simpler"
            ) from error

    def _work(self, work: Callable[[], "CompiledGrammar"], done: "Future[CompiledGrammar]") -> None:
        failure = GrammarRefused("the grammar could not be compiled; the server's log says why")
        try:
            done.set_result(work())
        except GrammarRefused as refused:
            failure = refused
        finally:
            self._places.release()
            if not done.done():
                done.set_exception(failure)

    def _keep(self, spec: GrammarSpec, compiled: "CompiledGrammar") -> None:
        with self._gate:
            self._kept[spec] = compiled
            while (
                len(self._kept) > self._limits.most_kept
                or sum(map(_bytes_of, self._kept)) > self._limits.most_kept_bytes
            ):
                self._kept.popitem(last=False)


class CompiledGrammar:
    """A grammar over one tokenizer's tokens."""

    def __init__(self, matcher: LLMatcher, vocabulary: "_Opened") -> None:
        self._matcher = matcher  # at the start, where it stays
        self._vocabulary = vocabulary

    def constraint(self) -> "GrammarConstraint":
        """For one answer, from its start."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary)


class GrammarConstraint:
    """Where one answer stands in its grammar. Its methods raise GrammarFault where the grammar
    cannot go on, and again each time from then on.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: "_Opened") -> None:
        self._matcher = matcher
        self._tokens = vocabulary.tokens
        self._mask = allocate_token_bitmask(1, vocabulary.library.vocab_size)

    def forbid(self, logits: Logits) -> None:
        """Set the logits [V] of tokens that cannot come next to minus infinity, in place.

        V may be more or less than the tokenizer has tokens; what it does not have is forbidden.
        """
        allowed = self._allowed(len(logits))
        np.copyto(logits[: len(allowed)], -np.inf, where=~allowed)
        logits[len(allowed) :] = -np.inf

    def advance(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def finished(self) -> bool:
        """No text can follow: the answer has ended, with or without a stop token."""
        return self._matcher.is_stopped()

    def allowed_ids(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """At least one, in ascending order."""
        return np.flatnonzero(self._allowed(self._tokens))

    def _allowed(self, most: int) -> "np.ndarray[tuple[int], np.dtype[np.bool]]":
        """Of the first `most` tokens at most."""
        fill_next_token_bitmask(self._matcher, self._mask)
        self._check()
        bits = np.unpackbits(self._mask[0].view(np.uint8), count=self._tokens, bitorder="little")
        allowed = bits[:most].view(np.bool)
        if not allowed.any():
            raise GrammarFault("the grammar allows no token of this model here")
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFault(f"the grammar cannot go on: {_words(self._matcher)}")


@dataclass(frozen=True, slots=True)
class _Opened:
    """A tokenizer as llguidance knows it."""

    library: LLTokenizer
    tokens: int  # ids from here on are not the tokenizer's
    openers: tuple[int, ...]  # `{`, `[` and `"`, behind which most of a schema lies


def _opened(tokens: GrammarTokens) -> _Opened:
    openers = tuple(map(tokens.id_of, (b"{", b"[", b'"')))
    return _Opened(tokens.opened(), tokens.count, openers)


def _compiled(vocabulary: _Opened, spec: GrammarSpec) -> CompiledGrammar:
    try:
        grammar = _WRITTEN[spec.kind](spec.text)
    except (ValueError, RecursionError) as error:
        raise _refused(spec, str(error)) from error
    matcher = LLMatcher(vocabulary.library, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise _refused(spec, _words(matcher))
    compiled = CompiledGrammar(matcher, vocabulary)
    try:
        _try(compiled.constraint(), vocabulary)
    except GrammarFault as fault:
        raise _refused(spec, str(fault)) from fault
    return compiled


def _try(constraint: GrammarConstraint, vocabulary: _Opened) -> None:
    """Some limits are met, and some contradictions show, only when there is some text."""
    for _ in range(TRIED_TOKENS):
        allowed = constraint.allowed_ids()
        openers = (token for token in vocabulary.openers if token in allowed)
        constraint.advance(next(openers, int(allowed[len(allowed) // 2])))
        if constraint.finished:
            break


def _refused(spec: GrammarSpec, words: str) -> GrammarRefused:
    """Found by llguidance, in its words."""
    return GrammarRefused(f"this {spec.kind} cannot be kept to: {words}")


def _words(matcher: LLMatcher) -> str:
    words = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    words = words.replace("NoExtensionBias", "nothing that this model can say fits it")
    return words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS]} …"


def _of_schema(text: str) -> str:
    if text == "true":
        text = "{}"
    if not text.startswith("{"):
        raise ValueError("a schema that some text fits is an object, or true")
    if is_endless(json.loads(text)):
        raise ValueError("it requires itself, so no answer to it could end")
    overrides: JsonCompileOptions = {  # a schema can ask for others itself
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_pattern": WHITESPACE,
        "lenient": False,
    }
    return LLMatcher.grammar_from_json_schema(text, overrides=overrides)


def _of_choices(text: str) -> str:
    choices = json.loads(text)
    if not choices:
        raise ValueError("there are no choices")
    written = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return LLMatcher.grammar_from_lark(f"start: {written}")


_WRITTEN: dict[str, Callable[[str], str]] = {
    "json_object": lambda _: _of_schema('{"type":"object"}'),
    "json_schema": _of_schema,
    "regex": LLMatcher.grammar_from_regex,
    "choice": _of_choices,
    "lark": LLMatcher.grammar_from_lark,
}


def _bytes_of(spec: GrammarSpec) -> int:
    return len(spec.text.encode("utf-8", "surrogatepass"))
