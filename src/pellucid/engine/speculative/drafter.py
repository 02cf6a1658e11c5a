"""The contract between the engine and whoever guesses ahead."""

from __future__ import annotations

from typing import Protocol

from pellucid.core.sequence import Sequence


class Drafter(Protocol):
    """Guesses the next tokens of sequences. Not thread-safe: called by the engine between its other work of a step.

    A guess is certain: a draft token stands for itself, with probability 1 (a point mass). It is accepted where the
    token that the model's own distribution and the request's own random number choose at its place is the same, so a
    guess never changes what is answered, however bad it is (docs/speculation.md).

    It sees a sequence as it is: `token_ids` grow by what was chosen and never change otherwise. What it keeps of one,
    it keeps under the Sequence itself.
    """

    is_cheap: bool
    """Whether guessing takes next to no time. The engine then asks for every sequence in every step, also for guesses
    that are not computed, to learn from them whether guessing would pay."""

    def prepare(self, sequences: list[Sequence]) -> None:
        """Do what guessing for `sequences` takes beside the guesses themselves; called before each `propose`, and timed
        apart from it. Does not raise."""
        ...

    def propose(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        """Guess what comes after `sequences[i].token_ids`: at most `max_tokens[i]` tokens, 1 or more; perhaps none.

        Token ids are of the model's vocabulary. Some of them, from the end, may never be computed. Does not raise:
        where it cannot guess, or cannot yet, it guesses nothing.
        """
        ...

    def observe(self, sequence: Sequence, draft_token_ids: list[int], chosen_token_ids: list[int]) -> None:
        """What came of guesses that were computed, once `sequence` has the tokens accepted and may have ended.

        Args:
            draft_token_ids: those of the guesses that were computed, k of them, 1 or more.
            chosen_token_ids: the token chosen at each of the 1 + k rows: entry i is what the model goes on with after
                the sequence as it was and the first i draft tokens, whether or not these were accepted.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended, or has given way to others and may come again; perhaps one that it never saw."""
        ...

    def close(self) -> None:
        """Free what it holds. No call comes after it."""
        ...
