"""Beam search over the sequences of a lockstep group (pellucid.decoding.beam)."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

from pellucid.core.outputs import Logprob
from pellucid.core.sampling_params import SamplingParams
from pellucid.decoding.beam import Beam, BeamSearch, Choices, Ending
from pellucid.engine.logprobs import token_logprobs
from pellucid.engine.search.base import Continuation, Hypothesis, SampledRow
from pellucid.engine.text import SequenceText
from pellucid.tokenizer.tokenizer import Tokenizer


class BeamGroupSearch:
    """The `GroupSearch` of a request with `num_beams`: each beam is a live sequence."""

    processed_logprobs = True
    num_ahead = 0

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        """
        Args:
            max_length: most tokens to generate.
            eos_token_ids: tokens that end a beam, beside the `stop_token_ids` of `params`.
        """
        self._params = params
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._stop_token_ids = eos_token_ids.union(params.stop_token_ids or ())
        self._texts: dict[Beam, SequenceText] = {}
        self._search = BeamSearch(
            params.num_beams,
            max_length=max_length,
            ends=self._ending,
            num_ending_tokens=len(self._stop_token_ids) + (params.num_beams if params.stop else 0),
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            num_beam_groups=params.num_beam_groups,
            diversity_penalty=params.diversity_penalty,
        )
        self.num_sequences = params.num_beams
        self.num_logprobs = min(max(self._search.num_choices, params.logprobs or 0), tokenizer.vocab_size)

    def advance(self, rows: ListLike[SampledRow]) -> list[Continuation]:
        live = self._search.advance([Choices(row.top_ids, row.top_logprobs) for row in rows])
        self._texts = {beam: self._texts[beam] for beam in live if beam in self._texts}
        return [Continuation(beam.parent.row, beam.token_id) for beam in live if beam.parent is not None]

    def answers(self) -> list[Hypothesis]:
        return [self._hypothesis(beam) for beam in self._search.best(self._params.n)]

    def _ending(self, beam: Beam) -> Ending | None:
        token_id = beam.token_id
        if token_id in self._stop_token_ids:
            return "stop", None if token_id in self._eos_token_ids else token_id
        if self._params.stop:
            assert beam.parent is not None
            before = self._texts.get(beam.parent)
            text = SequenceText(self._params, self._tokenizer) if before is None else before.fork()
            text.push(token_id, stopped=False)
            if text.stop_string is not None:
                return "stop", text.stop_string
            self._texts[beam] = text
        return None

    def _hypothesis(self, beam: Beam) -> Hypothesis:
        path = beam.path
        finish_reason, stop_reason = beam.ending or (None, None)
        return Hypothesis(
            [step.token_id for step in path],
            finish_reason,
            stop_reason,
            beam.cumulative_logprob,
            None if self._params.logprobs is None else [self._logprobs(step) for step in path],
        )

    def _logprobs(self, beam: Beam) -> dict[int, Logprob]:
        count, choices = self._params.logprobs or 0, beam.choices
        assert choices is not None
        return token_logprobs(
            self._tokenizer, beam.token_id, beam.logprob, choices.token_ids[:count], choices.logprobs[:count]
        )
