"""Masks of the requests whose answers follow a grammar, worked out in threads while the forward pass runs: where it
leaves processors free, and all but those that take less than handing them over."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence as ListLike
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import EngineError, InvalidRequestError, PellucidError
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.decoding.grammar import Grammar, GrammarMatcher

Result: TypeAlias = NDArray[np.uint32] | PellucidError

MASK_SECONDS = 30.0
"""Longest that a step waits for its masks. llguidance's own limits end one in well under a second."""


HANDOVER_SECONDS = 50e-6
"""About what handing over to a thread and back costs. Masks that took less the last time are worked out at once."""


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
    """The grammars of the requests that have one. False while there are none.

    Args:
        num_threads: threads that work out masks. With 0 all are worked out before the forward pass: on a processor that
            it computes on, they would hold up its other threads too (docs/benchmarks.md).
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._grammars: dict[SequenceGroup, tuple[Grammar, dict[Sequence, GrammarMatcher]]] = {}
        self._workers: _Workers | None = None
        self._begun: list[list[_Job]] = []
        self._at_once: list[tuple[int, Result]] = []

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
        self._begun, self._at_once = [], []
        if self._num_threads < 1 or sum(job.matcher.seconds for job in jobs) < HANDOVER_SECONDS:
            self._at_once = _rows_of(jobs, _work(jobs))
            return
        if self._workers is None or self._workers.process != os.getpid():  # a forked child has no threads of its parent
            self._workers = _Workers(self._num_threads)
        num_parts = min(len(jobs), self._workers.num_threads)
        self._begun = [jobs[first::num_parts] for first in range(num_parts)]
        self._workers.begin(self._begun)

    def join(self) -> list[tuple[int, Result]]:
        """The masks of the step that was begun, each with its row, uint32 [ceil(vocab_size / 32)]; or why there is
        none. Rows without a grammar are left out."""
        parts, self._begun = self._begun, []
        if not parts or self._workers is None:
            return self._at_once
        done = self._workers.join(len(parts))
        late = [job for number, part in enumerate(parts) if number not in done for job in part]
        return [pair for pairs in done.values() for pair in pairs] + _rows_of(late, [_too_slow()] * len(late))

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


class _Workers:
    """Threads that work out masks: as a ThreadPoolExecutor, for one caller, with less to do at each handing over.
    They end when nobody holds it any more.

    Attributes:
        process: whose threads they are.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.process = os.getpid()
        self._step = 0
        self._tasks: SimpleQueue[tuple[int, int, list[_Job]] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, int, list[tuple[int, Result]]]] = SimpleQueue()
        for number in range(num_threads):
            name = f"pellucid-masks-{number}"
            threading.Thread(target=_serve, args=(self._tasks, self._done), name=name, daemon=True).start()
        weakref.finalize(self, _dismiss, self._tasks, num_threads)

    def begin(self, parts: list[list[_Job]]) -> None:
        """Give out the parts of a step."""
        self._step += 1
        for number, part in enumerate(parts):
            self._tasks.put((self._step, number, part))

    def join(self, count: int) -> dict[int, list[tuple[int, Result]]]:
        """The results of the step that was begun, by the number of the part; without those not done in time."""
        results: dict[int, list[tuple[int, Result]]] = {}
        deadline = monotonic() + MASK_SECONDS
        while len(results) < count:
            try:
                step, number, of_part = self._done.get(timeout=max(0.0, deadline - monotonic()))
            except Empty:
                break
            if step == self._step:  # else nobody waited for it: that step failed, or took too long
                results[number] = of_part
        return results


def _serve(
    tasks: SimpleQueue[tuple[int, int, list[_Job]] | None], done: SimpleQueue[tuple[int, int, list[tuple[int, Result]]]]
) -> None:
    while (task := tasks.get()) is not None:
        step, number, jobs = task
        done.put((step, number, _rows_of(jobs, _work(jobs))))


def _dismiss(tasks: SimpleQueue[tuple[int, int, list[_Job]] | None], num_threads: int) -> None:
    for _ in range(num_threads):
        tasks.put(None)


def _work(jobs: list[_Job]) -> list[NDArray[np.uint32] | PellucidError]:
    """For each, the masks of all its rows."""
    results: list[NDArray[np.uint32] | PellucidError] = []
    for job in jobs:
        begin = perf_counter()
        try:
            results.append(job.matcher.masks(job.token_ids, job.drafts))
        except PellucidError as refusal:
            results.append(refusal)
        except Exception as defect:  # which is no reason for the others to wait
            error = EngineError(f"the masks of this request failed: {defect!r}")
            error.__cause__ = defect
            results.append(error)
        job.matcher.seconds = perf_counter() - begin
    return results


def _rows_of(jobs: list[_Job], results: ListLike[NDArray[np.uint32] | PellucidError]) -> list[tuple[int, Result]]:
    """The rows of the jobs one by one."""
    return [
        (job.first_row + row, result[row] if isinstance(result, np.ndarray) else result)
        for job, result in zip(jobs, results, strict=True)
        for row in range(1 + len(job.drafts))
    ]


def _too_slow() -> InvalidRequestError:
    return InvalidRequestError(
        f"structured_outputs: what may come next was not known after {MASK_SECONDS:g} s: make the grammar simpler",
        param="structured_outputs",
    )
