"""Prompt lookup: what followed the same tokens earlier in the text will follow them again.

Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with Reference: Lossless Acceleration of Large Language
Models" (arXiv:2304.04487).
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from pellucid.core.sequence import Sequence, SequenceGroup


class NgramDrafter:
    """Finds the last tokens of a sequence in its prompt and its output: the longest n-gram, and of those its last
    occurrence. Implements `Drafter`.

    A token takes the same few dictionary entries wherever it stands. The continuations of one prompt share its part.

    Args:
        shortest, longest: how many tokens must be the same, and how many are compared at most.
    """

    is_cheap = True

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(shortest, longest + 1)
        self._indexes: dict[Sequence, _Index] = {}
        self._prompts: WeakValueDictionary[SequenceGroup, _Followers] = WeakValueDictionary()

    def prepare(self, sequences: list[Sequence]) -> None:
        """Guessing takes nothing else."""

    def propose(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        return [self._guess(sequence, most) for sequence, most in zip(sequences, max_tokens, strict=True)]

    def observe(self, sequence: Sequence, draft_token_ids: list[int], chosen_token_ids: list[int]) -> None:
        """Nothing to learn: the text itself says all."""

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)

    def close(self) -> None:
        self._indexes.clear()

    def _guess(self, sequence: Sequence, most: int) -> list[int]:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = _Index(self._prompt(sequence), sequence.num_prompt_tokens, self._lengths)
        tokens = sequence.token_ids
        begin = index.find(tokens)
        if begin is None:
            return []
        guess = tokens[begin : begin + most]
        period = len(guess)
        while len(guess) < most:  # the match reaches the end: what repeats goes on repeating
            guess.append(guess[-period])
        return guess

    def _prompt(self, sequence: Sequence) -> _Followers:
        group = sequence.group
        prompt = self._prompts.get(group)
        if prompt is None:
            prompt = self._prompts[group] = _Followers()
            prompt.add(group.prompt_token_ids, 1, self._lengths)
        return prompt


class _Followers:
    """Which token came last after each n-gram, as its position."""

    __slots__ = ("__weakref__", "positions")

    def __init__(self) -> None:
        self.positions: dict[tuple[int, ...], int] = {}

    def add(self, tokens: list[int], begin: int, lengths: range) -> None:
        """Enter the n-grams that the tokens from position `begin` on follow."""
        positions = self.positions
        for position in range(begin, len(tokens)):
            for length in lengths:
                if length > position:
                    break
                positions[tuple(tokens[position - length : position])] = position


class _Index:
    """The n-grams of one sequence: those of its prompt, and those that its output follows."""

    __slots__ = ("_lengths", "_num_indexed", "_output", "_prompt")

    def __init__(self, prompt: _Followers, num_prompt_tokens: int, lengths: range) -> None:
        self._prompt = prompt
        self._output = _Followers()
        self._num_indexed = num_prompt_tokens
        self._lengths = lengths

    def find(self, tokens: list[int]) -> int | None:
        """Position of the token that followed the longest n-gram at the end of `tokens` where it was last, or None."""
        self._output.add(tokens, self._num_indexed, self._lengths)
        self._num_indexed = len(tokens)
        output, prompt = self._output.positions, self._prompt.positions
        for length in reversed(self._lengths):
            ngram = tuple(tokens[-length:])  # one that is longer than the text is found nowhere
            position = output.get(ngram)
            if position is None:
                position = prompt.get(ngram)
            if position is not None:
                return position
        return None
