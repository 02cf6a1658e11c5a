"""The masks of a step: each sequence's own, in threads, between begin and join."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import EngineError, InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.decoding.grammar import GrammarMatcher
from pellucid.engine import grammar_masks
from pellucid.engine.constraints import ConstraintBook
from pellucid.engine.grammar_masks import GrammarMasks
from tests.support.grammars import allowed, compiled
from tests.support.mutants import mutant
from tests.support.sequences import make_group
from tests.support.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
PROMPT = TOKENIZER.encode("prompt")
Row = tuple[Sequence, list[int]]


def group_of(masks: GrammarMasks, **params: Any) -> SequenceGroup:
    group = make_group(PROMPT)
    masks.open(group, compiled(TOKENIZER, **params))
    return group


def rows_of(sequence: Sequence, text: str, drafts: str = "") -> list[Row]:
    so_far = PROMPT + TOKENIZER.encode(text)
    draft_ids = [TOKENIZER.encode(draft)[0] for draft in drafts]
    return [(sequence, so_far + draft_ids[:count]) for count in range(len(draft_ids) + 1)]


def texts(mask: Any) -> set[str]:
    return {TOKENIZER.decode([token_id]) for token_id in allowed(mask)}


def masks_after_a_grammar() -> list[Any]:
    """Those of a request that has no grammar, once the one that had has ended."""
    book = ConstraintBook(TOKENIZER, TOKENIZER.vocab_size, num_mask_threads=0)
    one, other = make_group(PROMPT), make_group(PROMPT, SamplingParams(banned_token_ids=[3]))
    book.open(one, compiled(TOKENIZER, choice=["x1", "x2"]))
    book.open(other)
    book.begin(rows_of(one.sequences[0], "") + rows_of(other.sequences[0], ""))
    assert [mask is not None for mask in book.join({})] == [True, True]
    book.close(one)
    book.begin(rows_of(other.sequences[0], "a"))
    return book.join({})


def test_masks_end_with_their_request() -> None:
    (mask,) = masks_after_a_grammar()
    assert len(allowed(mask)) == TOKENIZER.vocab_size - 1


def test_a_mutant_that_keeps_masks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(
        ConstraintBook.begin, "self._grammars.begin(rows)", "self._grammars and self._grammars.begin(rows)"
    )
    monkeypatch.setattr(ConstraintBook, "begin", changed)
    with pytest.raises((AssertionError, IndexError)):
        test_masks_end_with_their_request()


def test_each_row_gets_the_mask_of_its_own_sequence() -> None:
    masks = GrammarMasks(2)
    assert not masks
    one, other = group_of(masks, choice=["x1", "x2"]), group_of(masks, choice=["y3"])
    plain = make_group(PROMPT)
    assert masks
    rows = [
        *rows_of(plain.sequences[0], "x", "12"),
        *rows_of(one.sequences[0], "", "x1"),
        *rows_of(plain.sequences[0], ""),
        *rows_of(other.sequences[0], "y"),
        *rows_of(one.sequences[0], "x"),
    ]
    masks.begin(rows)
    results = dict(masks.join())
    assert sorted(results) == [3, 4, 5, 7, 8]
    assert [texts(results[row]) for row in (3, 4, 5, 7, 8)] == [{"x"}, {"1", "2"}, {""}, {"3"}, {"1", "2"}]


def test_a_step_without_grammars_starts_no_thread() -> None:
    masks = GrammarMasks(2)
    group_of(masks, choice=["x"])
    masks.begin(rows_of(make_group(PROMPT).sequences[0], ""))
    assert masks.join() == []
    assert masks._workers is None


def test_an_ended_request_is_forgotten() -> None:
    masks = GrammarMasks(2)
    group = group_of(masks, choice=["x"])
    masks.close(group)
    masks.close(group)
    assert not masks


def test_masks_are_worked_out_while_the_caller_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    caller_goes_on = threading.Event()
    work = GrammarMatcher.masks

    def waits_for_the_caller(self: GrammarMatcher, *args: Any) -> Any:
        assert caller_goes_on.wait(60)
        return work(self, *args)

    monkeypatch.setattr(GrammarMatcher, "masks", waits_for_the_caller)
    masks = GrammarMasks(2)
    group = group_of(masks, choice=["x"])
    masks.begin(rows_of(group.sequences[0], ""))
    caller_goes_on.set()  # never, if begin waited for the masks
    assert texts(dict(masks.join())[0]) == {"x"}


@pytest.mark.parametrize("quick", [True, False])
def test_masks_are_handed_over_unless_that_takes_longer(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[str] = []
    work = GrammarMatcher.masks

    def watched(self: GrammarMatcher, *args: Any) -> Any:
        workers.append(threading.current_thread().name)
        return work(self, *args)

    monkeypatch.setattr(GrammarMatcher, "masks", watched)
    monkeypatch.setattr(grammar_masks, "HANDOVER_SECONDS", 1000.0 if quick else 0.0)
    masks = GrammarMasks(2)
    group = group_of(masks, choice=["xyz"])
    for text, expected in (("", "x"), ("x", "y"), ("xy", "z")):
        masks.begin(rows_of(group.sequences[0], text))
        assert texts(dict(masks.join())[0]) == {expected}
    assert workers[0].startswith("pellucid-masks")  # nobody knows yet
    assert {name == threading.current_thread().name for name in workers[1:]} == {quick}


def test_where_no_processor_is_free_masks_are_worked_out_at_once() -> None:
    masks = GrammarMasks(0)
    group = group_of(masks, choice=["xyz"])
    masks.begin(rows_of(group.sequences[0], ""))
    assert masks._workers is None
    assert texts(dict(masks.join())[0]) == {"x"}


def test_one_request_that_fails_does_not_take_others_with_it() -> None:
    masks = GrammarMasks(2)
    one, other = group_of(masks, choice=["x"]), group_of(masks, choice=["y"])
    masks.begin([*rows_of(one.sequences[0], "q", "q"), *rows_of(other.sequences[0], "")])
    results = dict(masks.join())
    assert isinstance(results[0], InvalidRequestError)
    assert results[0] is results[1]
    assert texts(results[2]) == {"y"}


def test_a_defect_is_told_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: GrammarMatcher, *args: Any) -> Any:
        raise ZeroDivisionError

    masks = GrammarMasks(2)
    group = group_of(masks, choice=["x"])
    with monkeypatch.context() as patch:
        patch.setattr(GrammarMatcher, "masks", broken)
        masks.begin(rows_of(group.sequences[0], ""))
        result = dict(masks.join())[0]
    assert isinstance(result, EngineError)
    assert isinstance(result.__cause__, ZeroDivisionError)
    masks.begin(rows_of(group.sequences[0], ""))
    assert texts(dict(masks.join())[0]) == {"x"}


def test_a_step_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def stuck(self: GrammarMatcher, *args: Any) -> Any:
        released.wait()
        raise InvalidRequestError("too late")

    monkeypatch.setattr(GrammarMatcher, "masks", stuck)
    monkeypatch.setattr(grammar_masks, "MASK_SECONDS", 0.01)
    masks = GrammarMasks(2)
    group = group_of(masks, choice=["x"])
    masks.begin(rows_of(group.sequences[0], ""))
    result = dict(masks.join())[0]
    released.set()
    assert isinstance(result, InvalidRequestError)
    assert "not known after 0.01 s" in result.message


def test_what_nobody_waited_for_is_not_taken_for_the_next_step() -> None:
    masks = GrammarMasks(2)
    group = group_of(masks, choice=["xyz"])
    for text, expected in (("", "x"), ("x", "y"), ("xy", "z")):
        masks.begin(rows_of(group.sequences[0], ""))  # a step whose forward pass failed
        masks.begin(rows_of(group.sequences[0], text))
        assert texts(dict(masks.join())[0]) == {expected}


def test_the_threads_end_with_the_engine() -> None:
    masks = GrammarMasks(2)
    group = group_of(masks, choice=["x"])
    others = set(threading.enumerate())
    masks.begin(rows_of(group.sequences[0], ""))
    masks.join()
    assert masks._workers is not None
    tasks = masks._workers._tasks
    threads = set(threading.enumerate()) - others
    assert len(threads) == masks._workers.num_threads > 0
    del masks
    gc.collect()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert tasks.empty()


def test_sequences_of_a_group_go_their_own_ways() -> None:
    masks = GrammarMasks(2)
    group = make_group(PROMPT, num_lockstep=2)
    masks.open(group, compiled(TOKENIZER, choice=["ax", "by", "bz"]))
    first, second = group.sequences
    for texts_so_far, expected in [
        (("", ""), ({"a", "b"}, {"a", "b"})),
        (("a", "b"), ({"x"}, {"y", "z"})),
        (("b", "by"), ({"y", "z"}, {""})),  # as after the second was forked from the first, and went back
        (("", "a"), ({"a", "b"}, {"x"})),
    ]:
        masks.begin([*rows_of(first, texts_so_far[0]), *rows_of(second, texts_so_far[1])])
        results = dict(masks.join())
        assert (texts(results[0]), texts(results[1])) == expected


def test_a_forked_child_has_threads_of_its_own() -> None:
    masks = GrammarMasks(2)
    group = group_of(masks, choice=["x"])
    rows = rows_of(group.sequences[0], "")
    masks.begin(rows)
    expected = dict(masks.join())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            masks.begin(rows)
            code = 0 if np.array_equal(dict(masks.join())[0], expected[0]) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
