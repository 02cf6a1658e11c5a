"""Grammars that an answer follows: which tokens may come next. The work is llguidance's
(https://github.com/guidance-ai/llguidance): a lexer of regular expression derivatives under an Earley parser, walked
over a trie of the vocabulary. Masks are those of pellucid.decoding.token_mask.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Collection
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Grammar:
    """A grammar, compiled for a vocabulary, to be shared between requests.

    Args:
        matcher: in its first state. It is only ever copied. Copies have one lexer in common, which grows with use: that
            makes later ones quicker, but one that comes to the lexer's limits stops them all.
        compile_anew: compiles it once more, to a matcher that has nothing in common with others.
        eos_token_ids: any of them may come where the answer may end.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        compile_anew: Callable[[Grammar], LLMatcher],
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._matcher = matcher
        self._compile_anew = compile_anew
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.eos_token_id = min(eos_token_ids)

    def matcher(self, stop_token_ids: Collection[int] = ()) -> GrammarMatcher:
        """For one sequence, whose answer `stop_token_ids` end too: they may come wherever it may end."""
        return GrammarMatcher(self, stop_token_ids)

    def begin(self) -> LLMatcher:
        """A matcher of llguidance's that has matched nothing."""
        return self._matcher.deep_copy()

    def begin_alone(self) -> LLMatcher:
        """The same, which no other can have brought to its limits. Takes as long as compiling does."""
        return self._compile_anew(self)


class GrammarMatcher:
    """How far a sequence has come in its grammar.

    Masks are a function of the grammar and of the tokens so far. What was matched before is only kept so as not to do
    it again: a caller may go back to fewer or other tokens at any time. A token matches in about ten microseconds.

    Attributes:
        seconds: how long the last masks took, for whoever plans the next ones; infinite before the first.
    """

    def __init__(self, grammar: Grammar, stop_token_ids: Collection[int]) -> None:
        self._grammar = grammar
        self._matcher = grammar.begin()
        self.seconds = math.inf
        self._matched: list[int] = []
        self._lock = threading.Lock()
        self._eos = grammar.eos_token_id
        self._ends = {*grammar.eos_token_ids, *stop_token_ids}
        self._all_allowed = np.full(-(-grammar.vocab_size // 32), 0xFFFFFFFF, np.uint32)
        if grammar.vocab_size % 32:
            self._all_allowed[-1] = (1 << grammar.vocab_size % 32) - 1
        self._stops: NDArray[np.uint32] | None = None
        if not grammar.eos_token_ids.issuperset(stop_token_ids):
            self._stops = np.zeros_like(self._all_allowed)
            for token_id in stop_token_ids:
                self._stops[token_id // 32] |= np.uint32(1 << token_id % 32)

    def masks(self, token_ids: ListLike[int], drafts: ListLike[int] = ()) -> NDArray[np.uint32]:
        """What may come after `token_ids`, the answer so far, and after each of the `drafts` that may follow it.

        Returns:
            uint32 [1 + len(drafts), ceil(vocab_size / 32)]. Row i is after `drafts[:i]`. It allows all after an end,
            and where the grammar does not allow those: such drafts are not chosen, so nobody asks what comes after.

        Raises:
            InvalidRequestError: the grammar takes more work here than the limits allow, no token of the vocabulary
                goes on with it, or it does not allow `token_ids`.
        """
        with self._lock:
            try:
                return self._masks(token_ids, drafts)
            except InvalidRequestError:  # llguidance stays in its error, which may be the fault of others
                self._matcher, self._matched = self._grammar.begin_alone(), []
                return self._masks(token_ids, drafts)

    def _masks(self, token_ids: ListLike[int], drafts: ListLike[int]) -> NDArray[np.uint32]:
        rows = np.empty((1 + len(drafts), len(self._all_allowed)), np.uint32)
        if drafts or not token_ids or token_ids[-1] in self._ends:
            rows[:] = self._all_allowed
        if token_ids and token_ids[-1] in self._ends:
            return rows
        self._move_to(token_ids)
        self._fill(rows[0])
        for row, draft in enumerate(drafts):
            if draft in self._ends or not _allows(rows[row], draft):
                break
            if not self._matcher.try_consume_tokens([draft]):
                raise self._failed()
            self._matched.append(draft)
            self._fill(rows[row + 1])
        return rows

    def _move_to(self, token_ids: ListLike[int]) -> None:
        """Match `token_ids`, and nothing else."""
        matched = self._matched
        if matched != token_ids[: len(matched)]:
            common = next(
                (place for place, (one, other) in enumerate(zip(matched, token_ids, strict=False)) if one != other),
                min(len(matched), len(token_ids)),
            )
            if not self._matcher.rollback(len(matched) - common):
                raise self._failed()
            del matched[common:]
        new = list(token_ids[len(matched) :])
        if new:
            if self._matcher.try_consume_tokens(new) != len(new):
                raise self._failed("the next one does not follow the grammar")
            matched += new

    def _fill(self, row: NDArray[np.uint32]) -> None:
        self._matcher.unsafe_compute_mask_ptr(row.__array_interface__["data"][0], row.nbytes)
        if self._matcher.is_error():
            raise self._failed()
        if self._stops is not None and _allows(row, self._eos):
            row |= self._stops

    def _failed(self, reason: str = "") -> InvalidRequestError:
        place = f"after {len(self._matched)} tokens of the answer"
        if self._matcher.is_error() or not reason:
            reason = explained(self._matcher.get_error())
        return InvalidRequestError(f"structured_outputs: {place}, {reason}", param="structured_outputs")


def _allows(mask: NDArray[np.uint32], token_id: int) -> bool:
    return bool(int(mask[token_id // 32]) >> token_id % 32 & 1)


_HALF_REASON = 300  # characters


_PLACE = re.compile(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?|\n\s*\d+ \| .*", re.DOTALL)
"""Where in a grammar an error is, and the grammar."""


def explained(error: str, *, own_grammar: bool = True) -> str:
    """What llguidance says, in one line, without what is of use to its developers alone; of a long grammar that it
    repeats, the beginning and the end; of one that the request did not write itself, nothing."""
    text = error.split("\n<", 1)[0].strip()
    if not own_grammar:
        text = _PLACE.sub("", text)
    if text.startswith("NoExtension"):
        return "no token can follow: the grammar cannot be fulfilled"
    text = " ".join(text.split()) or "the grammar cannot be followed"
    return text if len(text) <= 2 * _HALF_REASON else f"{text[:_HALF_REASON]} ... {text[-_HALF_REASON:]}"
