"""Search: the sequences of a lockstep group go on together, as something that sees all of them decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pellucid.core.outputs import FinishReason, Logprob
from pellucid.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SampledRow:
    """What was computed at the last token of a live sequence.

    Attributes:
        sequence: whose token it is. It is the search's to read until it has said what comes next.
        token_id: the token that its sampling parameters choose.
        logprob: log-probability of `token_id`; NaN where none was asked for.
        top_ids: int32 [k], the most probable tokens, as many as were asked for, by falling probability; fewer where the
            vocabulary has fewer.
        top_logprobs: float32 [k], their log-probabilities.
    """

    sequence: Sequence
    token_id: int
    logprob: float
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


class Continuation(NamedTuple):
    """How a live sequence goes on.

    Attributes:
        parent: number of the row it goes on from. Several from one parent are forks of it; a parent that none goes on
            from gives its KV blocks back.
        token_id: its next token.
    """

    parent: int
    token_id: int


@dataclass(slots=True)
class Hypothesis:
    """An answer of a search.

    Attributes:
        token_ids: every token generated, the one that stopped included.
        finish_reason: why it ended; None if it has not.
        stop_reason: as in CompletionOutput.
        cumulative_logprob: sum of its tokens' log-probabilities.
        logprobs: one dictionary a token, or None.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


class GroupSearch(Protocol):
    """Decides how the live sequences of one lockstep group go on.

    What it says depends on the rows it was given alone. So the answer is the same whatever else runs, after chunks,
    prefix hits and preemptions too.

    Attributes:
        num_sequences: most that are live at once; the group keeps so many places in the batch.
        num_logprobs: how many top alternatives its rows need; -1 for none and no log-probability either.
        processed_logprobs: whether log-probabilities are those after every transform.
        num_ahead: tokens by which live sequences are ahead of the answer when they are computed.
    """

    num_sequences: int
    num_logprobs: int
    processed_logprobs: bool
    num_ahead: int

    def advance(self, rows: ListLike[SampledRow]) -> list[Continuation]:
        """Take in `rows`, one for each live sequence, in the order in which they were given last time, beginning with
        one that has computed the prompt. How to go on: from 1 to `num_sequences`, or none: the search is over."""
        ...

    def answers(self) -> list[Hypothesis]:
        """The best answers, the best first. Before the search is over, also those that have not ended."""
        ...


class TokenSearch(ABC):
    """A search of one answer, each of whose tokens is final once it is told, so that it can be streamed.

    Tokens that end the answer and its length are not the search's concern, and neither is its text.

    Attributes:
        num_sequences, num_logprobs, processed_logprobs, num_ahead: as in GroupSearch.
        settled: the token that the last `advance` made final, its log-probability, and the alternatives it was chosen
            from; None if there was none.
    """

    num_sequences: int
    num_logprobs: int
    processed_logprobs: bool
    num_ahead: int = 0
    settled: SampledRow | None = None

    @abstractmethod
    def advance(self, rows: ListLike[SampledRow]) -> list[Continuation]:
        """As in GroupSearch, but never none."""
