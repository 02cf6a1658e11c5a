"""Requests that generate nothing: the hidden states of a prompt become one vector, or what the head makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.errors import BackendError, EngineClosedError
from pellucid.core.outputs import EmbeddingOutput, LabelOutput, RequestOutput
from pellucid.core.pooling_params import Pooling
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.engine.hidden_states import HiddenStates
from pellucid.engine.logprobs import GIVEN, score_given


class Pooler(ABC):
    """Makes one vector of the hidden states of a prompt, with the same bits however they come in.

    Attributes:
        num_known: how many tokens were taken in or are not needed, from the first on.
    """

    num_known: int

    @abstractmethod
    def observe(self, sequence: Sequence, hidden: NDArray[np.float32]) -> None:
        """As in HiddenStateReader."""

    @abstractmethod
    def pooled(self) -> NDArray[np.float64]:
        """float64 [hidden_size], once every token was taken in."""


class MeanPooler(Pooler):
    """The mean over all tokens: added up one token after another, so that chunks leave no trace in the bits."""

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        self.num_known = 0
        self._sum = np.zeros(hidden_size, np.float64)

    def observe(self, sequence: Sequence, hidden: NDArray[np.float32]) -> None:
        for row in hidden:
            self._sum += row
        self.num_known += len(hidden)

    def pooled(self) -> NDArray[np.float64]:
        return self._sum / self.num_known


class LastPooler(Pooler):
    """The last token."""

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        self.num_known = num_tokens - 1
        self._last = np.empty(hidden_size, np.float64)

    def observe(self, sequence: Sequence, hidden: NDArray[np.float32]) -> None:
        self._last[:] = hidden[-1]
        self.num_known += len(hidden)

    def pooled(self) -> NDArray[np.float64]:
        return self._last


POOLERS: dict[Pooling, type[MeanPooler | LastPooler]] = {"mean": MeanPooler, "last": LastPooler}


class PoolingBook:
    """The poolers of unfinished requests. False while there are none."""

    def __init__(self, hidden_states: HiddenStates, backend: Backend) -> None:
        self._hidden_states = hidden_states
        self._backend = backend
        self._poolers: dict[SequenceGroup, Pooler] = {}

    def __bool__(self) -> bool:
        return bool(self._poolers)

    def open(self, group: SequenceGroup) -> None:
        """Begin with a request that has `pooling_params` and was not scheduled yet."""
        assert group.pooling_params is not None
        pooler_class = POOLERS[group.pooling_params.pooling]
        pooler = pooler_class(len(group.prompt_token_ids), self._backend.spec.hidden_size)
        self._poolers[group] = pooler
        self._hidden_states.open(group, pooler)

    def result(self, group: SequenceGroup) -> NDArray[np.float32]:
        """What was asked for, of a request all of whose tokens were computed: an embedding, float32 [hidden_size], or
        the log-probabilities of label tokens, float32 [n].

        Raises:
            BackendError: the model gave hidden states, or logits, that are not finite.
        """
        params = group.pooling_params
        assert params is not None
        vector = self._poolers[group].pooled()
        if not np.isfinite(vector).all():
            raise BackendError("the model gave hidden states that are not finite")
        if params.label_token_ids:
            return self._logprobs(vector.astype(np.float32), np.array(params.label_token_ids, np.int32))
        if params.normalize:
            vector = vector / (np.sqrt(np.square(vector).sum()) or 1.0)
        return vector.astype(np.float32)

    def _logprobs(self, hidden: NDArray[np.float32], token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        logits = self._backend.project(hidden[None], normalize=False)
        record = GIVEN.copy()
        record["num_logprobs"] = 0
        # One row at a time: sampling may overwrite it, and copies for all would take memory.
        scores = [score_given(self._backend, logits.copy(), token_ids[[i]], record) for i in range(len(token_ids))]
        return np.concatenate([score.logprobs for score in scores])

    def close(self, group: SequenceGroup) -> None:
        """A request ended. No effect on one that was not opened."""
        if self._poolers.pop(group, None) is not None:
            self._hidden_states.close(group)


def embedding_output(reply: RequestOutput) -> EmbeddingOutput:
    """What the caller gets of a request for an embedding.

    Raises:
        EngineClosedError: it was aborted.
    """
    return EmbeddingOutput(_pooled(reply), reply.prompt, reply.prompt_token_ids, reply.metrics)


def label_output(reply: RequestOutput) -> LabelOutput:
    """What the caller gets of a request for the log-probabilities of labels.

    Raises:
        EngineClosedError: it was aborted.
    """
    return LabelOutput(_pooled(reply), reply.prompt, reply.prompt_token_ids, reply.metrics)


def _pooled(reply: RequestOutput) -> NDArray[np.float32]:
    if reply.pooled is None:
        raise EngineClosedError("the request was aborted before its prompt was computed")
    return reply.pooled
