"""From chosen tokens to text, stop strings and replies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pellucid.core.batch import SampledTokens
from pellucid.core.errors import BackendError, CapacityError, PellucidError
from pellucid.core.outputs import Logprob, RequestOutput, TokenOutput
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.engine.capture import CaptureBook
from pellucid.engine.logprobs import token_logprobs
from pellucid.engine.model_runner import StepResult
from pellucid.engine.pooling import PoolingBook
from pellucid.engine.replies import completion_output, echoed_logprobs, request_output, returned_sequences
from pellucid.engine.scheduler import Scheduler
from pellucid.engine.search.base import SampledRow
from pellucid.engine.search.book import SearchBook
from pellucid.engine.text import SequenceText, whole_text
from pellucid.tokenizer.tokenizer import Tokenizer


@dataclass(slots=True)
class StepOutput:
    """What a step has to tell.

    Attributes:
        tokens: one for each token chosen for a streamed request, in order.
        finished: the terminal reply of every request that ended.
        num_begun: how many continuations had their first token.
    """

    tokens: list[TokenOutput] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)
    num_begun: int = 0


class OutputProcessor:
    """Carries the text of the sequences that are streamed or have stop strings, ends those whose stop string came, and
    writes the replies."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        captures: CaptureBook,
        searches: SearchBook,
        pooling: PoolingBook,
    ) -> None:
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._captures = captures
        self._searches = searches
        self._pooling = pooling
        self._texts: dict[Sequence, SequenceText] = {}

    def process_prompts(self, result: StepResult) -> None:
        """Take in the log-probabilities of tokens of prompts."""
        scores = result.prompt_scores
        if scores is None:
            return
        row = 0
        for group, num_rows in result.prompts:
            count = group.sampling_params.num_prompt_logprobs
            assert group.prompt_logprobs is not None
            for token_id in scores.token_ids[row : row + num_rows].tolist():
                group.prompt_logprobs.append(self._logprobs(count, token_id, scores, row))
                row += 1

    def process(
        self,
        samples: list[Sequence],
        token_ids: list[int],
        rows: Iterable[int],
        sampled: SampledTokens,
        now: float,
        output: StepOutput,
    ) -> None:
        """Take in the tokens chosen for `samples` at `now`, each at one of the `rows` of `sampled`, after the scheduler
        did; add what there is to tell."""
        ended: dict[SequenceGroup, TokenOutput | None] = {}
        for row, sequence, token_id in zip(rows, samples, token_ids, strict=True):
            group = sequence.group
            if not sequence.token_times:
                output.num_begun += 1
                if group.stream and group.sampling_params.echo:
                    self._stream_prompt(sequence, output)
            sequence.token_times.append(now)
            logprobs = None
            if sequence.cumulative_logprob is not None:
                sequence.cumulative_logprob += float(sampled.logprobs[row])
                if sequence.logprobs is not None:
                    logprobs = self._logprobs(sequence.group.sampling_params.num_logprobs, token_id, sampled, row)
                    sequence.logprobs.append(logprobs)
            token = None
            if group.stream:
                delta = self._advance(sequence, token_id)
                token = TokenOutput(
                    group.request_id,
                    sequence.index,
                    token_id,
                    delta,
                    logprobs,
                    sequence.finish_reason,
                    sequence.stop_reason,
                )
                output.tokens.append(token)
            elif group.sampling_params.stop:
                self._advance(sequence, token_id)
            if group.num_unfinished == 0:
                ended[group] = token
        for group, token in ended.items():  # only now have all of a group's sequences had their say
            self._end(group, token, output)

    def settle(self, answer: Sequence, row: SampledRow, now: float, output: StepOutput) -> None:
        """Take in the token that the search of a lockstep group has added to `answer` at `now`, chosen from `row`."""
        sampled = SampledTokens(
            np.array([row.token_id], np.int32),
            np.array([row.logprob], np.float32),
            row.top_ids[None],
            row.top_logprobs[None],
        )
        self.process([answer], [row.token_id], (0,), sampled, now, output)
        if answer.finish_reason is not None:
            group = answer.group
            self._scheduler.finish_group(group, answer.finish_reason)
            self._searches.close(group)
            self._end(group, output.tokens[-1] if group.stream else None, output)

    def finish_pooled(self, sequences: list[Sequence], output: StepOutput) -> None:
        """End requests that generate nothing, whose last token is computed; add their terminal replies."""
        for sequence in sequences:
            group = sequence.group
            try:
                pooled = self._pooling.result(group)
            except BackendError as error:
                self._scheduler.finish(sequence, "error", error=error)
                self._end(group, None, output)
            else:
                self._scheduler.finish(sequence, "stop")
                self._end(group, None, output).pooled = pooled

    def finish_early(self, group: SequenceGroup, sequences: list[Sequence], output: StepOutput) -> None:
        """Add the terminal reply of a group whose last `sequences` ended without a token: refused, failed, aborted; or
        whose search is over."""
        if group.is_lockstep:
            if not self._searches.settles_tokens(group):
                self._finish_search(group, output)
                return
            self._searches.close(group)
            sequences = group.sequences
        token = None
        for sequence in sequences:
            text = self._texts.get(sequence)
            delta = "" if text is None else text.finish()
            if group.stream:
                token = TokenOutput(group.request_id, sequence.index, None, delta, None, sequence.finish_reason)
                output.tokens.append(token)
        self._end(group, token, output)

    def fail(self, group: SequenceGroup, error: PellucidError, output: StepOutput) -> None:
        """Add the terminal reply of a group that a defect left in an unknown state: its tokens, and the text that was
        released."""
        if group.is_lockstep:
            self._searches.close(group)
        outputs = []
        for index, sequence in enumerate(returned_sequences(group)):
            text = self._texts.get(sequence)
            outputs.append(completion_output(index, sequence, "" if text is None else text.text, "error"))
        reply = request_output(group, outputs, error)
        output.finished.append(reply)
        if group.stream:
            index = outputs[-1].index
            output.tokens.append(TokenOutput(group.request_id, index, None, "", None, "error", request_output=reply))

    def _finish_search(self, group: SequenceGroup, output: StepOutput) -> None:
        """Add the terminal reply of a lockstep group that was ended; before it, where it is streamed, the tokens of one
        answer after another."""
        self._searches.close(group)
        token = None
        for sequence in group.sequences:
            reason, stop_reason = sequence.finish_reason, sequence.stop_reason
            token_ids = sequence.output_token_ids if group.stream or group.sampling_params.stop else []
            if group.stream and not token_ids:
                token = TokenOutput(group.request_id, sequence.index, None, "", None, reason)
                output.tokens.append(token)
            elif group.stream and group.sampling_params.echo:
                self._stream_prompt(sequence, output)
            for number, token_id in enumerate(token_ids, 1):
                is_last = number == len(token_ids)  # a stop string is found in its text once more
                sequence.finish_reason = reason if is_last and not isinstance(stop_reason, str) else None
                delta = self._advance(sequence, token_id)
                if group.stream:
                    logprobs = None if sequence.logprobs is None else sequence.logprobs[number - 1]
                    token = TokenOutput(
                        group.request_id,
                        sequence.index,
                        token_id,
                        delta,
                        logprobs,
                        sequence.finish_reason,
                        stop_reason if is_last else None,
                    )
                    output.tokens.append(token)
        self._end(group, token, output)

    def _end(self, group: SequenceGroup, last: TokenOutput | None, output: StepOutput) -> RequestOutput:
        """Add the terminal reply of a group, and give it to the `last` token that is streamed of it; the reply."""
        reply = self._reply(group)
        output.finished.append(reply)
        if last is not None:
            last.request_output = reply
        return reply

    def _stream_prompt(self, sequence: Sequence, output: StepOutput) -> None:
        """The tokens of the prompt, before the first one chosen for `sequence`."""
        group = sequence.group
        text = self._texts[sequence] = SequenceText(group.sampling_params, self._tokenizer)
        for position, token_id in enumerate(group.prompt_token_ids):
            logprobs = None if sequence.logprobs is None else echoed_logprobs(group, position)
            delta = text.echo(token_id)
            output.tokens.append(TokenOutput(group.request_id, sequence.index, token_id, delta, logprobs))

    def _advance(self, sequence: Sequence, token_id: int) -> str:
        """The text that `token_id` releases; ends the sequence if it completes a stop string."""
        text = self._texts.get(sequence)
        if text is None:
            params = sequence.group.sampling_params
            text = self._texts[sequence] = SequenceText(params, self._tokenizer)
            if params.echo:
                for prompt_token_id in sequence.group.prompt_token_ids:
                    text.echo(prompt_token_id)
        delta = text.push(token_id, stopped=sequence.finish_reason == "stop")
        if sequence.is_finished:
            delta += text.finish()
        if text.stop_string is not None:
            self._scheduler.finish(sequence, "stop")
            sequence.finish_reason, sequence.stop_reason = "stop", text.stop_string
        return delta

    def _logprobs(self, count: int, token_id: int, sampled: SampledTokens, row: int) -> dict[int, Logprob]:
        tops = sampled.top_ids[row, :count], sampled.top_logprobs[row, :count]
        return token_logprobs(self._tokenizer, token_id, float(sampled.logprobs[row]), *tops)

    def _reply(self, group: SequenceGroup) -> RequestOutput:
        texts = {sequence: self._texts.pop(sequence, None) for sequence in group.sequences}
        error = next((sequence.error for sequence in group.sequences if sequence.error is not None), None)
        outputs = []
        for index, sequence in enumerate(returned_sequences(group)):
            text = texts[sequence]
            released = whole_text(sequence, self._tokenizer) if text is None else text.text
            assert sequence.finish_reason is not None
            outputs.append(completion_output(index, sequence, released, sequence.finish_reason))
        captured = None
        if self._captures:
            try:
                captured = self._captures.close(group)
            except CapacityError as no_memory:
                error = error or no_memory
        return request_output(group, outputs, error, captured)
