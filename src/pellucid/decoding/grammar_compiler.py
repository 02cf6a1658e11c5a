"""From what a request asks its answer to look like to a grammar, within limits of size and time."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pellucid.core.errors import InvalidRequestError, PellucidError, QueueFullError
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.decoding.grammar import Grammar, explained
from pellucid.decoding.grammar_vocabulary import build_vocabulary
from pellucid.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

COMPILE_SECONDS = 5.0
"""Longest that a request waits for its grammar."""
CACHED_GRAMMARS = 64
MAX_LEXER_STATES = 50_000
"""Of one grammar, all requests that share it together; a state takes up to 2 kB."""
NUM_THREADS = 2
STACK_BYTES = 256 << 20
"""llguidance compiles recursively. What the size limits of StructuredOutputsParams let through was measured to take up
to 64 MiB of stack, where an ordinary thread has 8 and the process would die. Memory is taken only as it is used."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer, in threads of its own, and keeps those used last. From any thread.

    Compilation is native code that lets Python go on, and ends by limits of its own (in fractions of a second; the
    worst found took 6 s). A request does not wait longer than COMPILE_SECONDS for it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # guards the next four; held for moments only
        self._grammars: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def compile(self, params: StructuredOutputsParams, seconds: float = COMPILE_SECONDS) -> Grammar:
        """The grammar of `params`; waits for it.

        Raises:
            InvalidRequestError: it is malformed, cannot be fulfilled, or takes too much work or time to compile; or the
                model has no end-of-sequence token.
            QueueFullError: others are being compiled all that time.
        """
        self.prepare().result()
        future = self.submit(params)
        try:
            return future.result(seconds)
        except TimeoutError:
            raise self.too_slow(future, seconds) from None

    def prepare(self) -> Future[LLTokenizer]:
        """The vocabulary, once it is there: what the first grammar waits for beside its own compilation. Whoever calls
        `submit` waits for this first, so that the time it takes is not that of the grammar. Raises InvalidRequestError
        from the future if the model has no end-of-sequence token."""
        if self._vocabulary is None:
            return self._submit(self._get_vocabulary)
        return _done(self._vocabulary)

    def submit(self, params: StructuredOutputsParams) -> Future[Grammar]:
        """The grammar of `params`, once it is there. Raises from the future as `compile`, except for the time."""
        with self._lock:
            grammar = self._grammars.get(params)
            if grammar is not None:
                self._grammars.move_to_end(params)
        return self._submit(partial(self._compile, params)) if grammar is None else _done(grammar)

    @staticmethod
    def too_slow(future: Future[Grammar], seconds: float) -> PellucidError:
        """Give up on a future of `submit` that took too long; the error to tell."""
        if future.cancel():
            return QueueFullError(
                f"structured_outputs: other grammars were being compiled for {seconds:g} s; try again later",
                param="structured_outputs",
            )
        return InvalidRequestError(
            f"structured_outputs: the grammar takes more than {seconds:g} s to compile: make it simpler",
            param="structured_outputs",
        )

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        matcher = self._matcher(params)
        compile_anew = partial(self._compile_anew, params)
        grammar = Grammar(matcher, compile_anew, self._tokenizer.vocab_size, self._tokenizer.eos_token_ids)
        with self._lock:
            self._grammars[params] = grammar
            while len(self._grammars) > CACHED_GRAMMARS:
                self._grammars.popitem(last=False)
        return grammar

    def _compile_anew(self, params: StructuredOutputsParams, worn: Grammar) -> LLMatcher:
        """A matcher for a request that came to the limits of the `worn` grammar, which no new request gets."""
        with self._lock:
            if self._grammars.get(params) is worn:
                del self._grammars[params]
        return self._submit(partial(self._matcher, params)).result()

    def _submit(self, function: Callable[[], T]) -> Future[T]:
        from concurrent.futures import ThreadPoolExecutor  # here, as all that plain requests do not need

        with self._lock:
            if self._process != os.getpid():  # forked: the threads stayed behind, with whatever they held
                self._process, self._threads, self._vocabulary_lock = os.getpid(), None, threading.Lock()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(NUM_THREADS, "pellucid-grammar")
            return _submit_with_stack(self._threads, function)

    def _matcher(self, params: StructuredOutputsParams) -> LLMatcher:
        """In a thread with a large stack: the grammar of `params`, in its first state."""
        from llguidance import LLMatcher, LLParserLimits

        vocabulary = self._get_vocabulary()
        name = f"structured_outputs.{params.kind}"
        try:
            source = _source(params, self._tokenizer)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{name}: {error or 'nested too deeply'}", param=name) from None
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(vocabulary, source, log_level=0, limits=limits)
        first = None if matcher.is_error() else matcher.deep_copy()
        if first is not None:
            first.compute_bitmask()  # what cannot even begin is refused here
        if first is None or first.is_error():
            reason = explained((first or matcher).get_error(), own_grammar=params.structural_tag is None)
            raise InvalidRequestError(f"{name}: {reason}", param=name)
        return matcher

    def _get_vocabulary(self) -> LLTokenizer:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = build_vocabulary(self._tokenizer)
            return self._vocabulary


def _done(result: T) -> Future[T]:
    from concurrent.futures import Future

    done: Future[T] = Future()
    done.set_result(result)
    return done


_stack_lock = threading.Lock()


def _submit_with_stack(threads: ThreadPoolExecutor, function: Callable[[], T]) -> Future[T]:
    """`threads.submit`, where a thread that it starts gets a stack of STACK_BYTES."""
    with _stack_lock:
        usual = threading.stack_size(STACK_BYTES)
        try:
            return threads.submit(function)
        finally:
            threading.stack_size(usual)


def _source(params: StructuredOutputsParams, tokenizer: Tokenizer) -> str:
    """What to compile, in llguidance's form.

    Raises:
        ValueError: it is malformed, as far as seen here.
    """
    from llguidance import LLMatcher

    if params.json is not None or params.json_object:
        schema = '{"type":"object"}' if params.json_object else params.json
        defaults: Any = {"whitespace_flexible": False}
        if params.whitespace_pattern is not None:
            defaults["whitespace_pattern"] = params.whitespace_pattern
        return LLMatcher.grammar_from_json_schema(schema, defaults=defaults)  # type: ignore[arg-type]
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        from json import dumps

        choices = " | ".join(dumps(choice, ensure_ascii=False) for choice in params.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}\n")
    if params.structural_tag is not None:
        from pellucid.decoding.structural_tag import structural_tag_grammar

        return structural_tag_grammar(str(params.structural_tag), tokenizer, lark_of)
    assert params.grammar is not None
    return LLMatcher.grammar_from_lark(lark_of(params.grammar))


def lark_of(grammar: str) -> str:
    """A grammar in Lark, from one in either form."""
    if re.search(r"(?m)^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", grammar) is None:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # of its own, and plain ones
        raise ValueError(f"as GBNF (it has `::=`): {error}") from None
