"""The text of a sequence: as its tokens come, or all at once."""

from __future__ import annotations

from copy import copy, deepcopy

from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.decoding.stop import StopMatcher
from pellucid.engine.replies import has_echo
from pellucid.tokenizer.detokenizer import IncrementalDetokenizer
from pellucid.tokenizer.tokenizer import Tokenizer


class SequenceText:
    """Tokens in, text released out.

    Attributes:
        stop_string: the stop string that was found, or None.
    """

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_matcher",
        "_min_tokens",
        "_num_tokens",
        "_pieces",
        "_stripper",
        "stop_string",
    )

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.stop_string: str | None = None
        self._pieces: list[str] = []
        self._num_tokens = 0
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._detokenizer = None
        if params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, skip_special_tokens=params.skip_special_tokens, continuation=not params.echo
            )
        stop = params.stop_strings
        self._matcher = StopMatcher(stop, include_stop=params.include_stop_str_in_output) if stop else None
        self._stripper = Stripper() if params.strip else None

    def fork(self) -> SequenceText:
        """A second one that has read the same tokens, and goes its own way."""
        twin = copy(self)
        twin._pieces = list(self._pieces)
        twin._detokenizer = copy(self._detokenizer)
        twin._matcher = copy(self._matcher)
        twin._stripper = deepcopy(self._stripper)
        return twin

    @property
    def text(self) -> str:
        """All that was released."""
        return "".join(self._pieces)

    def echo(self, token_id: int) -> str:
        """Take the next token of the prompt, in which no stop string counts. Text that is now certain."""
        return "" if self._detokenizer is None else self._release(self._detokenizer.push(token_id))

    def push(self, token_id: int, *, stopped: bool) -> str:
        """Take the next token; `stopped` if the sequence ended because of it. Text that is now certain."""
        self._num_tokens += 1
        if self._detokenizer is None or (stopped and not self._include_stop):
            return ""
        return self._match(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The sequence is over: text that was held back."""
        if self._detokenizer is None or self.stop_string is not None:
            return ""
        text = self._match(self._detokenizer.flush())
        if self._matcher is not None and self.stop_string is None:
            text += self._release(self._matcher.flush())
        return text

    def _match(self, text: str) -> str:
        if self._matcher is not None and self._num_tokens > self._min_tokens:
            text = self._matcher.push(text)
            self.stop_string = self._matcher.matched
        return self._release(text)

    def _release(self, text: str) -> str:
        if self._stripper is not None:
            text = self._stripper.push(text)
        if text:
            self._pieces.append(text)
        return text


class Stripper:
    """`str.strip` over a text that comes in pieces: white space is held back until something follows it."""

    __slots__ = ("_has_begun", "_held")

    def __init__(self) -> None:
        self._has_begun = False
        self._held: list[str] = []

    def push(self, text: str) -> str:
        """What is now certain, up to and with the next piece."""
        if not self._has_begun:
            text = text.lstrip()
        kept = text.rstrip()
        if not kept:
            if self._has_begun:
                self._held.append(text)
            return ""
        self._has_begun = True
        released = "".join([*self._held, kept])
        self._held = [text[len(kept) :]]
        return released


def whole_text(sequence: Sequence, tokenizer: Tokenizer) -> str:
    """What `SequenceText` releases over all of an ended sequence's tokens, for one without stop strings."""
    params = sequence.group.sampling_params
    if not params.detokenize:
        return ""
    echo = has_echo(sequence)
    token_ids = sequence.token_ids[:] if echo else sequence.output_token_ids
    if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
        del token_ids[-1:]
    text = tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens, continuation=not echo)
    return text.strip() if params.strip else text
