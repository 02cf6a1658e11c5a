"""Which tokens a request may choose next, whatever the model makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError, PellucidError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.decoding.grammar import Grammar
from pellucid.decoding.token_mask import TokenMask
from pellucid.engine.grammar_masks import GrammarMasks
from pellucid.tokenizer.tokenizer import Tokenizer

Row: TypeAlias = tuple[Sequence, ListLike[int]]
"""Whose token is to be chosen, and all tokens before it: prompt, output, and drafts that are taken as accepted."""

_MASKS = ("allowed_token_ids", "banned_token_ids", "bad_words", "min_tokens")
_RULE_TOKENS_OUT = (*_MASKS, "structured_outputs", "no_repeat_ngram_size", "logits_processors", "dola_layers")


class ConstraintBook:
    """The constraints of the requests that have any. False while there are none, which is all it costs others.

    The masks of a step are begun before the forward pass and joined after it, so that what takes long can be done
    meanwhile.

    Args:
        num_mask_threads: threads that masks of grammars may take then, which the forward pass leaves free.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, num_mask_threads: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._constraints: dict[SequenceGroup, TokenConstraints] = {}
        self._grammars = GrammarMasks(num_mask_threads)
        self._rows: list[Row] = []
        self._masks: list[TokenMask | None] = []

    def __bool__(self) -> bool:
        return bool(self._constraints) or bool(self._grammars)

    def open(self, group: SequenceGroup, grammar: Grammar | None = None) -> None:
        """Begin to watch over a request, whose answers follow `grammar`; a refusal leaves nothing behind.

        Raises:
            InvalidRequestError: its parameters leave no token to begin with.
        """
        self._open_constraints(group)
        if grammar is not None:
            self._grammars.open(group, grammar)

    def _open_constraints(self, group: SequenceGroup) -> None:
        params = group.sampling_params
        if not any(getattr(params, name) not in (None, (), 0) for name in _MASKS):
            return
        constraints = TokenConstraints(
            params,
            bad_word_token_ids(params.bad_words or (), self._tokenizer),
            group.stop_token_ids,
            num_prompt_tokens=len(group.prompt_token_ids),
            vocab_size=self._vocab_size,
        )
        first = constraints.mask(group.prompt_token_ids)
        if first is not None and not first.any():
            raise nothing_left(group.sequences[0], group.prompt_token_ids)
        self._constraints[group] = constraints

    def close(self, group: SequenceGroup) -> None:
        """A request has ended. No effect on one without constraints."""
        self._constraints.pop(group, None)
        self._grammars.close(group)

    def begin(self, rows: list[Row]) -> None:
        """Begin the masks of a step. The rows of one sequence stand together, each with one draft more."""
        self._rows = rows
        self._masks = []
        self._grammars.begin(rows)  # perhaps in other threads, while the rest of this goes on
        for sequence, token_ids in rows:
            constraints = self._constraints.get(sequence.group)
            self._masks.append(None if constraints is None else constraints.mask(token_ids))

    def join(self, failures: dict[SequenceGroup, PellucidError]) -> list[TokenMask | None]:
        """The masks of the step that was begun, one a row; None where all tokens are allowed. Requests whose grammar
        fails are added to `failures`, with the reason."""
        rows, self._rows = self._rows, []
        masks, self._masks = self._masks, []
        for row, result in self._grammars.join():
            if isinstance(result, PellucidError):
                failures.setdefault(rows[row][0].group, result)
                masks[row] = None
            else:
                own = masks[row]
                masks[row] = result if own is None else own & result
        return masks


class TokenConstraints:
    """What the parameters of one request rule out: a pure function of the tokens so far.

    Args:
        bad_words: the token ids of each string that may not be written; only the last one of each is ruled out, after
            the others.
        stop_token_ids: which tokens end the text, ruled out before `min_tokens`.
    """

    def __init__(
        self,
        params: SamplingParams,
        bad_words: Iterable[ListLike[int]],
        stop_token_ids: Iterable[int],
        *,
        num_prompt_tokens: int,
        vocab_size: int,
    ) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._min_length = num_prompt_tokens + params.min_tokens
        whole = token_mask(range(vocab_size), vocab_size)
        mask = whole if params.allowed_token_ids is None else token_mask(params.allowed_token_ids, vocab_size)
        mask = mask_without(mask, params.banned_token_ids or ())
        self._words_of_last: dict[int, list[ListLike[int]]] = {}  # by the token before their last one
        for word in bad_words:
            if len(word) > 1:
                self._words_of_last.setdefault(word[-2], []).append(word)
            else:
                mask = mask_without(mask, word)
        self._whole = whole
        self._mask = None if (mask == whole).all() else mask
        self._early_mask = mask_without(mask, stop_token_ids)

    def mask(self, token_ids: ListLike[int]) -> TokenMask | None:
        """Which tokens may follow `token_ids`, prompt and output; None for all. Read-only."""
        mask = self._early_mask if len(token_ids) < self._min_length else self._mask
        words = self._words_of_last.get(token_ids[-1])
        if words is not None:
            output = list(token_ids[self._num_prompt_tokens :])
            ends = [word[-1] for word in words if output[1 - len(word) :] == list(word[:-1])]
            if ends:
                mask = mask_without(self._whole if mask is None else mask, ends)
        return mask


def token_mask(token_ids: Iterable[int], vocab_size: int) -> TokenMask:
    """The mask that allows `token_ids` alone."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    allowed[np.fromiter(token_ids, np.int64)] = True
    return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def one_each(token_ids: NDArray[np.int32], vocab_size: int) -> list[TokenMask | None]:
    """Masks that allow one token each."""
    masks = np.zeros((len(token_ids), -(-vocab_size // 32)), np.uint32)
    masks[np.arange(len(token_ids)), token_ids >> 5] = np.uint32(1) << (token_ids & 31).astype(np.uint32)
    return list(masks)


def mask_without(mask: TokenMask, token_ids: Iterable[int]) -> TokenMask:
    """A copy of `mask` that rules `token_ids` out too."""
    ids = np.fromiter(token_ids, np.int64)
    left = mask.copy()
    np.bitwise_and.at(left, ids >> 5, ~(np.uint32(1) << (ids & 31).astype(np.uint32)))
    return left


def bad_word_token_ids(words: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The ways in which `words` are written, each as its tokens: with and without a space before it, as in vLLM."""
    written: dict[tuple[int, ...], None] = {}
    for word in words:
        word = word.removeprefix(" ")
        for text in (word, f" {word}"):
            if token_ids := tokenizer.encode(text, add_special_tokens=False):
                written[tuple(token_ids)] = None
    return [list(token_ids) for token_ids in written]


def nothing_left(sequence: Sequence, token_ids: ListLike[int]) -> InvalidRequestError:
    """The error of a request that has no token to choose from after `token_ids`, prompt and output."""
    params = sequence.group.sampling_params
    names = [name for name in _RULE_TOKENS_OUT if getattr(params, name) not in (None, (), 0)]
    count = len(token_ids) - sequence.num_prompt_tokens
    return InvalidRequestError(
        f"{' and '.join(names)} {'rules' if len(names) == 1 else 'rule'} out every token after {count} tokens of the "
        "answer, so that none could be chosen",
        param=names[0],
    )
