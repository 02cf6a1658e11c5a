"""Beam search, and its diverse groups (Vijayakumar et al., 2016, arXiv:1610.02424).

Knows nothing of models: it is given the most probable next tokens of each beam, and says which beams there are next.
It gives the sequences that `generate` of transformers 5 gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pellucid.core.outputs import FinishReason

EarlyStopping: TypeAlias = bool | Literal["never"]
Ending: TypeAlias = tuple[FinishReason, int | str | None]
"""Why a beam ends, as `finish_reason` and `stop_reason` of a CompletionOutput."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The most probable next tokens of a beam.

    Attributes:
        token_ids: int32 [k].
        logprobs: float32 [k], -inf where a token must not come next.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


@dataclass(eq=False, slots=True)
class Beam:
    """A beam is its last token, and the beam it came from.

    Attributes:
        parent: None for the prompt.
        row: where it stands among the beams that are live together.
        token_id, logprob: its last token; of the prompt, nothing.
        length: tokens generated.
        cumulative_logprob: sum of their log-probabilities.
        sum_scores: the same less what the tokens cost that other groups had chosen: by this it is ranked.
        score: `sum_scores` / length ** length_penalty, once it has ended.
        ending: why it ended; None if it has not.
        choices: where `token_id` was chosen from.
    """

    parent: Beam | None = None
    row: int = 0
    token_id: int = -1
    logprob: float = 0.0
    length: int = 0
    cumulative_logprob: float = 0.0
    sum_scores: float = 0.0
    score: float = 0.0
    ending: Ending | None = None
    choices: Choices | None = None

    @property
    def path(self) -> list[Beam]:
        """The beams from its first token to its last."""
        beams: list[Beam] = []
        beam = self
        while beam.parent is not None:
            beams.append(beam)
            beam = beam.parent
        return beams[::-1]


class BeamSearch:
    """One search. Ties always fall to the beam that ranks higher, and then to the lowest token id.

    Each group of b = `num_beams / num_beam_groups` beams is a search of its own. All continuations of its beams by one
    token are ranked by score. The best b that have not ended go on. Those of the first b that have ended are kept, b at
    most of the whole search, the best. A group is over

    - when none of its beams can go on;
    - with `early_stopping`: as soon as it has kept b;
    - without: when it has kept b, and its best beam would score no better than the worst of them if it ended now;
    - with "never": the same, if it ended at the length up to `max_length` that is best for it.

    The groups take turns at each step. A token costs a group `diversity_penalty` for each time that groups before it
    have chosen it at this step, and the cost stays in the score of the beam.

    Attributes:
        live: the beams that go on; at first the prompt alone.
        num_choices: how many of its most probable next tokens each of them needs.
    """

    def __init__(
        self,
        num_beams: int,
        *,
        max_length: int,
        ends: Callable[[Beam], Ending | None],
        num_ending_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        num_beam_groups: int = 1,
        diversity_penalty: float = 0.0,
    ) -> None:
        """
        Args:
            num_beams: a multiple of `num_beam_groups`.
            max_length: number of generated tokens at which a beam ends with "length".
            ends: why a beam ends with its last token, or None. Asked once for each beam that may go on.
            num_ending_tokens: with how many different tokens a beam may end at most.
        """
        self.live = [Beam()]
        self._group_size = num_beams // num_beam_groups
        self._diversity_penalty = diversity_penalty
        self._groups = [
            _Group(self._group_size, max_length, ends, length_penalty, early_stopping, self.live)
            for _ in range(num_beam_groups)
        ]
        # So many of a beam's own tokens may end it, or be passed by for what other groups have chosen.
        self.num_choices = self._group_size + num_ending_tokens + num_beams - self._group_size

    def advance(self, choices: ListLike[Choices]) -> list[Beam]:
        """Go on with the `choices` of each live beam, in their order.

        Returns:
            The beams that are live now; each one's `parent` was before. None: the search is over.
        """
        chosen: Counter[int] = Counter()
        for group in self._groups:
            group.advance(choices, chosen, self._diversity_penalty)
            chosen.update(beam.token_id for beam in group.live)
        self.live = [beam for group in self._groups for beam in group.live]
        for row, beam in enumerate(self.live):
            beam.row = row
        return self.live

    def best(self, count: int) -> list[Beam]:
        """The best `count` beams that have ended, the best first; fewer where there are fewer. Before the search is
        over, beams that have not ended come after them."""
        ended = sorted((beam for group in self._groups for beam in group.ended), key=lambda beam: -beam.score)
        live = sorted(self.live, key=lambda beam: -beam.sum_scores)
        return [*ended, *live][:count]


class _Group:
    """A beam search of `size` beams."""

    def __init__(
        self,
        size: int,
        max_length: int,
        ends: Callable[[Beam], Ending | None],
        length_penalty: float,
        early_stopping: EarlyStopping,
        live: list[Beam],
    ) -> None:
        self.live = live
        self.ended: list[Beam] = []
        self._size = size
        self._max_length = max_length
        self._ends = ends
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping

    def advance(self, choices: ListLike[Choices], chosen: Counter[int], diversity_penalty: float) -> None:
        if not self.live:
            return
        length = self.live[0].length + 1
        live: list[Beam] = []
        for rank, beam in enumerate(self._continuations(choices, chosen, diversity_penalty)):
            if rank >= self._size and len(live) == self._size:
                break
            beam.ending = self._ends(beam)
            if beam.ending is None and length == self._max_length:
                beam.ending = ("length", None)
            if beam.ending is None:
                live.append(beam)
            elif rank < self._size:
                beam.score = beam.sum_scores / length**self._length_penalty
                self.ended.append(beam)
        self.live = live[: self._size]
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: self._size]
        if self._is_over(length):
            self.live = []

    def _continuations(
        self, choices: ListLike[Choices], chosen: Counter[int], diversity_penalty: float
    ) -> Iterator[Beam]:
        """Every choice of every beam that may come next, by falling score."""
        ranks, token_ids, logprobs, scores = [], [], [], []
        for rank, beam in enumerate(self.live):
            own = choices[beam.row]
            costs = [chosen[token_id] for token_id in own.token_ids.tolist()] if chosen else [0] * len(own.token_ids)
            ranks.append(np.full(len(own.token_ids), rank))
            token_ids.append(own.token_ids)
            logprobs.append(own.logprobs)
            scores.append(beam.sum_scores + own.logprobs.astype(np.float64) - diversity_penalty * np.array(costs))
        all_ranks, all_ids, all_logprobs, all_scores = map(np.concatenate, (ranks, token_ids, logprobs, scores))
        order = np.lexsort((all_ids, all_ranks, -all_scores))
        columns = (all_ranks, all_ids, all_logprobs, all_scores)
        for rank, token_id, logprob, score in zip(*(column[order].tolist() for column in columns), strict=True):
            if logprob == -np.inf:
                continue
            parent = self.live[rank]
            yield Beam(
                parent,
                token_id=token_id,
                logprob=logprob,
                length=parent.length + 1,
                cumulative_logprob=parent.cumulative_logprob + logprob,
                sum_scores=score,
                choices=choices[parent.row],
            )

    def _is_over(self, length: int) -> bool:
        if len(self.ended) < self._size or not self.live:
            return False
        if self._early_stopping is True:
            return True
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self._max_length
        best_possible: float = self.live[0].sum_scores / length**self._length_penalty
        return best_possible <= self.ended[-1].score
