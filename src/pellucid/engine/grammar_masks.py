"""Masks of the requests whose answers follow a grammar, worked out in threads while the forward pass runs."""

from __future__ import annotations

import os
from collections.abc import Sequence as ListLike
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.core.processors import usable_processors
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.decoding.grammar import Grammar, GrammarMatcher

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Result: TypeAlias = NDArray[np.uint32] | InvalidRequestError

MASK_SECONDS = 30.0
"""Longest that a step waits for its masks. llguidance's own limits end one in well under a second."""


class _Job(NamedTuple):
    """The rows of one sequence.

    Attributes:
        first_row: of the step; its drafts have the rows after it.
        token_ids: the answer so far.
    """

    matcher: GrammarMatcher
    first_row: int
    token_ids: list[int]
    drafts: list[int]


class GrammarMasks:
    """The grammars of the requests that have one. False while there are none."""

    def __init__(self) -> None:
        self._grammars: dict[SequenceGroup, tuple[Grammar, dict[Sequence, GrammarMatcher]]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._process = 0
        self._begun: list[tuple[list[_Job], Future[list[Result]]]] = []

    def __bool__(self) -> bool:
        return bool(self._grammars)

    def open(self, group: SequenceGroup, grammar: Grammar) -> None:
        """Begin to hold the answers of a request to `grammar`."""
        self._grammars[group] = grammar, {}

    def close(self, group: SequenceGroup) -> None:
        """A request has ended. No effect on one without a grammar."""
        self._grammars.pop(group, None)

    def begin(self, rows: ListLike[tuple[Sequence, ListLike[int]]]) -> None:
        """Begin the masks of a step.

        Args:
            rows: whose token is to be chosen, and all tokens before it: prompt, output, and drafts taken as accepted.
                The rows of one sequence stand together, each with one draft more.
        """
        jobs = self._jobs(rows)
        if not jobs:
            self._begun = []
            return
        if self._threads is None or self._process != os.getpid():  # a forked child has none of its parent's threads
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(usable_processors(), "pellucid-masks")
            self._process = os.getpid()
        num_parts = min(len(jobs), usable_processors())
        parts = [jobs[first::num_parts] for first in range(num_parts)]
        self._begun = [(part, self._threads.submit(_work, part)) for part in parts]

    def join(self) -> dict[int, Result]:
        """The masks of the step that was begun, by row, uint32 [ceil(vocab_size / 32)]; or why there is none. Rows
        without a grammar are left out."""
        begun, self._begun = self._begun, []
        deadline = monotonic() + MASK_SECONDS
        results: dict[int, Result] = {}
        for part, future in begun:
            try:
                of_part = future.result(max(0.0, deadline - monotonic()))
            except TimeoutError:
                of_part = [_too_slow() for _ in part]
            for job, result in zip(part, of_part, strict=True):
                for row in range(1 + len(job.drafts)):
                    results[job.first_row + row] = result[row] if isinstance(result, np.ndarray) else result
        return results

    def _jobs(self, rows: ListLike[tuple[Sequence, ListLike[int]]]) -> list[_Job]:
        jobs: list[_Job] = []
        last: Sequence | None = None
        for row, (sequence, token_ids) in enumerate(rows):
            if sequence is last:
                jobs[-1].drafts.append(token_ids[-1])
                continue
            if (opened := self._grammars.get(sequence.group)) is None:
                last = None
                continue
            grammar, matchers = opened
            if (matcher := matchers.get(sequence)) is None:
                matcher = matchers[sequence] = grammar.matcher(sequence.group.stop_token_ids)
            answer = list(token_ids[sequence.num_prompt_tokens :])
            jobs.append(_Job(matcher, row, answer, []))
            last = sequence
        return jobs


def _work(jobs: list[_Job]) -> list[Result]:
    results: list[Result] = []
    for job in jobs:
        try:
            results.append(job.matcher.masks(job.token_ids, job.drafts))
        except InvalidRequestError as error:
            results.append(error)
    return results


def _too_slow() -> InvalidRequestError:
    return InvalidRequestError(
        f"structured_outputs: what may come next was not known after {MASK_SECONDS:g} s: make the grammar simpler",
        param="structured_outputs",
    )
